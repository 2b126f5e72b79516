"""What a fine-tuning run goes on from: the same command, and another one by force."""

import json
from dataclasses import fields, replace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from small import DENSE, SPARSE, small_model
from test_tuning import PLAN, data, parts, same_file
from training_kit import measured, uncompiled

from mm1_mlx.adapters.layers import PairSettings
from mm1_mlx.adapters.targets import Plan, Target
from mm1_mlx.checkpoint.disk import locked
from mm1_mlx.cli.tuning import parser
from mm1_mlx.errors import CheckpointError, ConfigError, DatasetError
from mm1_mlx.inference.identity import fingerprint
from mm1_mlx.training.answers import read_examples, write_examples
from mm1_mlx.training.conversations import open_split, open_train
from mm1_mlx.training.resuming import check_changes, flag_of
from mm1_mlx.training.state import load_state
from mm1_mlx.training.tuning import TuneSettings, TuneStage
from mm1_mlx.training.tuning_run import tune
from mm1_mlx.training.watching import Watch

pytestmark = pytest.mark.usefixtures(uncompiled.__name__)
assert data  # a fixture


WATCHED = ("valid", "valid_every", "watch")


def run(data, out, *, model=None, plan=PLAN, base="small", seed=0, **more):
    """Steps of a small run; what was told, and the metrics of each step."""
    made, processor = parts(data)
    lines, metrics = [], []
    asked = {
        key: more.pop(key)
        for key in ("resume", "force", "until", "save_every", *WATCHED)
        if key in more
    }
    tune(
        model() if model else made,
        processor,
        open_train(data),
        out,
        plan,
        TuneSettings(**({"steps": 6, "learning_rate": 3e-3} | more)),
        base=base,
        seed=seed,
        tell=lines.append,
        report=lambda now: metrics.append(now.metrics),
        **asked,
    )
    return lines, metrics


@pytest.fixture
def begun(data, tmp_path):
    """The folder of a run that was stopped after two steps of six."""
    run(data, tmp_path / "run", until=2)
    return tmp_path / "run"


# --- What is said --------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"learning_rate": 0.1},
            r"learning_rate: 0\.003, now 0\.1 \(--learning-rate\)",
        ),
        ({"steps": 9}, r"settings\.steps: 6, now 9 \(--iters\)"),
        ({"batch": 2}, r"settings\.batch: 4, now 2 \(--batch-size\)"),
        (
            {"plan": Plan(parts={"attention": Target(pairs=PairSettings(rank=2))})},
            r"parts\.attention\.rank: 4, now 2 \(--rank, --train\); .*connector: full, "
            r"now None \(--train\)",
        ),
        ({"seed": 1}, r"seed: 0, now 1 \(--seed\)"),
        ({"rates": {"connector": 0.5}}, r"rates\.connector: None.* \(--part-rate\)"),
        ({"plan": replace(PLAN, layers=1)}, r"plan\.layers: None, now 1 \(--num-lay"),
    ],
)
def test_what_changed_is_named_with_its_flag(data, begun, changes, message):
    before = {file: file.read_bytes() for file in begun.iterdir()}
    with pytest.raises(ConfigError, match=message + r".*--force to go on with the new"):
        run(data, begun, resume=True, **changes)
    assert before == {file: file.read_bytes() for file in begun.iterdir()}


def test_other_data_of_the_same_name(data, begun, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for file in data.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    lines = (other / "train.jsonl").read_text().splitlines()
    (other / "train.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    with pytest.raises(ConfigError, match=r"what the data holds \(--data\)"):
        run(other, begun, resume=True)
    told, metrics = run(other, begun, resume=True, force=True)
    assert "by force: what the data holds (--data)" in told and len(metrics) == 4


def test_every_setting_has_its_flag():
    """The names in the messages are flags that there are."""
    known = parser()._option_string_actions
    names = [f"settings.{field.name}" for field in fields(TuneSettings)]
    names += [f"plan.{field.name}" for field in fields(Plan)]
    names += [f"plan.parts.mlp.{field.name}" for field in fields(PairSettings)]
    names += ["plan.parts.mlp", "settings.rates.mlp"]
    for name in [*names, "model", "base.weights", "data.sha256", "seed"]:
        flags = [flag for flag in flag_of(name).split(", ") if flag]
        assert flags or name == "settings.betas", name
        assert all(flag in known for flag in flags), (name, flags)


# --- By force ------------------------------------------------------------------------


def test_force_goes_on_with_the_new_settings(data, begun):
    before, _ = load_state(begun / "tune.safetensors")
    new = {"learning_rate": 0.01, "steps": 5, "batch": 6, "accumulate": 3}
    lines, metrics = run(data, begun, resume=True, force=True, warmup=0, **new)
    assert any(line.startswith("by force: ") for line in lines)
    assert "going on from step 2 of 5" in lines and len(metrics) == 3
    assert metrics[0]["rate"] > 0.003  # the new peak, at step 2 of its cosine
    after, facts = load_state(begun / "tune.safetensors")
    assert facts["step"] == 5 and facts["recipe"]["settings"]["batch"] == 6
    steps = [json.loads(x)["step"] for x in (begun / "metrics.jsonl").open()]
    assert steps == [1, 2, 3, 4, 5]
    moved = [
        not mx.array_equal(a, b)
        for (_, a), (_, b) in zip(
            tree_flatten(before["parameters"]),
            tree_flatten(after["parameters"]),
            strict=True,
        )
    ]
    assert any(moved)
    # Now these are the settings to go on with.
    assert run(data, begun, resume=True, warmup=0, **new)[1] == []


def test_force_without_a_change_is_exact(data, begun, tmp_path):
    run(data, tmp_path / "whole")
    run(data, begun, resume=True, force=True)
    assert same_file(begun / "tune.safetensors", tmp_path / "whole/tune.safetensors")


def test_another_optimizer_begins_anew(data, begun):
    lines, metrics = run(data, begun, resume=True, force=True, optimizer="lion")
    assert any("it begins anew" in line for line in lines) and len(metrics) == 4
    lines, _ = run(data, begun, resume=True, optimizer="lion")
    assert not any("anew" in line for line in lines)


@pytest.mark.parametrize(
    "parts_",
    [
        {"attention": Target(pairs=PairSettings(rank=8, scale=2.0))},
        PLAN.parts | {"connector": Target(pairs=PairSettings(rank=4, scale=2.0))},
        {"attention": PLAN.parts["attention"]},
    ],
    ids=["rank", "kind", "parts"],
)
def test_arrays_that_do_not_fit_are_refused_by_force(data, begun, parts_):
    before = {file: file.read_bytes() for file in begun.iterdir()}
    plan = Plan(parts=parts_)
    message = r"holds other trained arrays than this run's: \d+ of \d+ differ, such as"
    with pytest.raises(CheckpointError, match=message):
        run(data, begun, plan=plan, resume=True, force=True)
    assert before == {file: file.read_bytes() for file in begun.iterdir()}


def test_a_model_of_other_shapes_is_refused_by_force(data, begun):
    def wider():
        return parts(data, replace(SPARSE, num_key_value_heads=4))[0]

    with pytest.raises(ConfigError, match=r"the model's config \(--model\)"):
        run(data, begun, model=wider, resume=True)
    with pytest.raises(CheckpointError, match=r"k_proj.*Train the same parts of the"):
        run(data, begun, model=wider, resume=True, force=True)


def test_fewer_steps_than_were_done(data, begun):
    with pytest.raises(ConfigError, match=r"of step 2, which is past the last one \(1"):
        run(data, begun, resume=True, force=True, steps=1)


# --- The model -----------------------------------------------------------------------


def test_another_model_of_the_same_name(data, begun):
    """One number of each weight in a hundred is enough to tell a fine-tuned model."""

    def other():
        model, _ = parts(data)
        down = model.decoder.layers[0].mlp.down_proj
        down.weight = down.weight * 1.001
        return model

    with pytest.raises(ConfigError, match=r": the model's weights \(--model\)\. Use"):
        run(data, begun, model=other, resume=True)
    lines, metrics = run(data, begun, model=other, resume=True, force=True)
    assert "by force: the model's weights (--model)" in lines and len(metrics) == 4


def test_the_same_model_in_another_place(data, begun, tmp_path):
    run(data, tmp_path / "whole")
    run(data, begun, base="elsewhere/small", resume=True)
    assert same_file(
        begun / "adapters.safetensors", tmp_path / "whole/adapters.safetensors"
    )


def test_a_fingerprint_is_of_config_and_weights():
    first = fingerprint(small_model(SPARSE, seed=1))
    assert first == fingerprint(small_model(SPARSE, seed=1))
    half = small_model(SPARSE, seed=1)
    half.config = replace(half.config, extra={"made": "elsewhere"})
    assert first == fingerprint(half)
    other = fingerprint(small_model(SPARSE, seed=2))
    assert first["config"] == other["config"] and first["weights"] != other["weights"]
    turned = small_model(replace(SPARSE, rope_theta=5e5), seed=1)
    assert first["config"] != fingerprint(turned)["config"]
    assert first["weights"] == fingerprint(turned)["weights"]
    assert first["config"] != fingerprint(small_model(DENSE))["config"]


# --- What a kill leaves --------------------------------------------------------------


def test_a_kill_before_the_first_checkpoint(data, begun, tmp_path):
    """Whatever of the folder is there already, --resume begins."""
    run(data, tmp_path / "whole")
    for left in ({"adapter_config.json", "run.json"}, {"adapter_config.json"}, set()):
        for file in begun.iterdir():
            if file.name not in left:
                file.unlink()
        lines, _ = run(data, begun, resume=True, until=1)
        assert "nothing was saved yet: beginning with the first step" in lines
    run(data, begun, resume=True)
    assert same_file(begun / "tune.safetensors", tmp_path / "whole/tune.safetensors")


def test_a_kill_between_checkpoint_and_log(data, begun, tmp_path):
    """The line of the checkpoint's step is in it, too."""
    log = begun / "metrics.jsonl"
    whole = measured(log)
    log.write_text(log.read_text().splitlines()[0] + '\n{"step": 2, "te')
    run(data, begun, resume=True, until=2)
    assert measured(log) == whole
    run(data, begun, resume=True)
    run(data, tmp_path / "whole")
    assert measured(log) == measured(tmp_path / "whole/metrics.jsonl")


def test_a_folder_that_was_never_made(data, tmp_path):
    """Killed while it planned; a folder of other things is not taken."""
    lines, _ = run(data, tmp_path / "new", resume=True)
    assert "nothing was saved yet: beginning with the first step" in lines
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("Dear")
    with pytest.raises(CheckpointError, match=r"has no tune\.safetensors"):
        run(data, tmp_path / "other", resume=True)


def test_what_a_kill_left_unmeasured_is_made_up_for(data, tmp_path):
    """A run saves first and measures then; also after the last step."""
    held = open_split(data, "valid")
    more = {"valid": held, "valid_every": 2, "steps": 4}
    more["watch"] = Watch(answer_every=2, examples=2)
    whole, out = tmp_path / "whole", tmp_path / "run"
    run(data, whole, **more)
    run(data, out, until=2, **more)
    wanted = measured(whole / "metrics.jsonl")
    for number, until in ((2, 2), (4, None)):
        run(data, out, resume=True, until=until, **more)
        log = out / "metrics.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        assert lines[-1].pop("valid") and "task_accuracy" in lines[-1]
        for name in ("task_accuracy", "task_right", "task_samples"):
            del lines[-1][name]
        log.write_text("".join(json.dumps(line) + "\n" for line in lines))
        if number == 4:
            write_examples(out, [replace(e, after=None) for e in read_examples(out)])
        told, _ = run(data, out, resume=True, until=until or 4, **more)
        assert any(line.startswith(f"after step {number}, made up") for line in told)
        assert measured(log) == wanted[: number + 1]
    assert all(e.after is not None for e in read_examples(out))
    assert read_examples(out) == read_examples(whole)


def test_two_runs_in_one_folder(data, begun):
    with (
        locked(begun),
        pytest.raises(CheckpointError, match="Another run is working in"),
    ):
        run(data, begun, resume=True)
    run(data, begun, resume=True)


def test_weights_that_a_step_has_ruined_are_not_saved(data, tmp_path, monkeypatch):
    """Nor where the next batch cannot be read, so that the run ends anyway."""
    out, make = tmp_path / "run", TuneStage.host_step
    plan = Plan(parts={"head": Target(), **PLAN.parts})
    more = {"plan": plan, "optimizer": "sgd", "clip": 1e9, "warmup": 0}
    run(data, out, until=1, learning_rate=1e-3, **more)
    before = (out / "tune.safetensors").read_bytes()

    def broken(self, step, rank, size):
        if step == 2:
            raise DatasetError("line 7 is broken")
        return make(self, step, rank, size)

    monkeypatch.setattr(TuneStage, "host_step", broken)
    for rate, saved in ((1e30, False), (1e-3, True)):
        with pytest.raises(DatasetError, match="line 7"):
            run(data, out, resume=True, force=True, learning_rate=rate, **more)
        assert ((out / "tune.safetensors").read_bytes() != before) == saved


def test_a_checkpoint_without_a_base(begun):
    """Of a version that did not keep it: refused, and said why."""
    recipe = json.loads((begun / "run.json").read_text())
    check_changes(begun / "tune.safetensors", recipe, False, lambda line: None)
    recipe["base"] = {"config": "other", "weights": "other"}
    with pytest.raises(ConfigError, match=r"the model's config \(--model\); the mod"):
        check_changes(begun / "tune.safetensors", recipe, False, lambda line: None)
