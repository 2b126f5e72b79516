"""What is told of a run: means, speed, expert load, answers to held-out samples."""

import json

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from test_tuning import PLAN, data, parts, same_file, stage_of  # noqa: F401

from helpers import assert_close, assert_equal
from mm1_mlx.adapters.layers import PairSettings
from mm1_mlx.adapters.targets import Plan, Target
from mm1_mlx.cli.training import Reporter, load_lines
from mm1_mlx.errors import DatasetError
from mm1_mlx.training.answers import (
    Example,
    is_right,
    normalised,
    question_of,
    read_examples,
    spread,
    task_accuracy,
    write_examples,
)
from mm1_mlx.training.conversations import Sample, open_split, open_train
from mm1_mlx.training.meter import Meter, MetricsLog
from mm1_mlx.training.trainer import Progress, Trainer
from mm1_mlx.training.tuning import TuneSettings
from mm1_mlx.training.tuning_run import tune
from mm1_mlx.training.watching import Watch

# --- Means ---------------------------------------------------------------------------


def progress(step: int, metrics: dict, steps: int = 2, **more) -> Progress:
    return Progress("tune", step, steps, metrics, 2.0 * step, step, **more)


def test_means_are_over_tokens_and_counts_are_added_up():
    """By hand: 1 token at a loss of 4 and 3 at 0 are a mean of 1, not of 2."""
    meter = Meter()
    one = {"text": 4.0, "accuracy": 0.0, "tokens": 1.0, "row_tokens": 10.0, "norm": 1.0}
    two = {"text": 0.0, "accuracy": 1.0, "tokens": 3.0, "row_tokens": 30.0, "norm": 2.0}
    arrays = ({"expert_tokens": [[8.0, 2.0]]}, {"expert_tokens": [[0.0, 30.0]]})
    for step, (metrics, held) in enumerate(zip((one, two), arrays, strict=True), 1):
        metrics["rate"] = float(step)
        more = {"arrays": held, "step_seconds": 0.5}
        meter.add(progress(step, metrics, **more))
    found = meter.take()
    assert found.metrics["text"] == 1.0 and found.metrics["accuracy"] == 0.75
    assert found.metrics["norm"] == 1.5 and found.metrics["rate"] == 2.0
    assert found.tokens_per_second == 40.0
    assert found.learned_per_second == 4.0
    assert found.expert_load == [[0.2, 0.8]]
    assert found.peak_memory == mx.get_peak_memory() / 1e9
    empty = meter.take()
    assert empty.metrics == {} and empty.tokens_per_second is None
    meter.add(progress(3, {"text": 5.0, "tokens": 0.0}))  # every sample was dropped
    assert meter.take().metrics["text"] == 0.0


def test_lines_of_a_run(capsys):
    reporter = Reporter(2)
    metrics = {"text": 1.0, "accuracy": 0.5, "tokens": 1.0, "row_tokens": 8.0}
    metrics |= {"rate": 1e-4, "norm": 3.0, "max_load": 0.5}
    arrays = {"expert_tokens": [[6.0, 2.0]]}
    more = {"steps": 5, "arrays": arrays, "step_seconds": 0.5}
    for step in (1, 2, 3):
        told = {"valid": 2.0, "task_accuracy": 0.5, "task_right": 4, "task_samples": 8}
        reporter.step(progress(step, metrics | (told if step == 3 else {}), **more))
    reporter.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(
        "tune 2/5 loss 1 accuracy 0.5 rate 0.0001 norm 3 | 4 s, 6 s left, 0.5 examples/"
        "s, 16 tokens/s (2 learned), peak "
    )
    assert lines[1] == "experts (▄ even, █ twice that): 1 ▆▂  most 75% (layer 1)"
    assert "valid 2 rate 0.0001 norm 3 right 4 of 8 |" in lines[2]  # at once, not at 4
    assert len(lines) == 4


def test_expert_load_in_words():
    few = load_lines([[0.5, 0.25, 0.25, 0.0], [0.25] * 4])
    assert few == ["experts (▄ even, █ twice that): 1 █▄▄·  2 ▄▄▄▄  most 50% (layer 1)"]
    many = [[1 / 64] * 64, [1.0] + [0.0] * 63]
    short = load_lines(many, whole=False)
    head = "experts (▄ even, █ twice that):"
    assert short == [f"{head} most 100%, layer 2 of 2 █{'·' * 63}"]
    assert load_lines(many) == [
        head,
        f"    1 {'▄' * 64} 1.6% to 1.6%",
        f"    2 █{'·' * 63} 0.0% to 100.0%",
    ]


def test_what_a_log_keeps(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl", every=2)
    log.note(0, {"task_accuracy": 0.5})
    log.note(0, {})
    metrics = {"text": 1.0, "tokens": 1.0, "row_tokens": 8.0}
    for step, counts in ((1, [8.0, 0.0]), (2, [0.0, 8.0]), (3, [8.0, 0.0])):
        arrays = {"expert_tokens": [counts]}
        more = {"arrays": arrays, "step_seconds": 0.25}
        log.take(progress(step, metrics, steps=3, **more))
    lines = [json.loads(x) for x in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert lines[1]["tokens_per_second"] == 32.0 and lines[1]["seconds"] == 0.25
    assert lines[1]["peak_memory"] == pytest.approx(
        mx.get_peak_memory() / 1e9, abs=1e-4
    )
    assert "expert_load" not in lines[1]
    assert lines[2]["expert_load"] == [[0.5, 0.5]]  # of both steps
    assert lines[3]["expert_load"] == [[1.0, 0.0]]


def test_counts_of_micro_batches_are_those_of_one_batch(data, tmp_path):  # noqa: F811
    found = []
    for accumulate in (1, 4):
        stage = stage_of(data, batch=8, accumulate=accumulate)
        trainer = Trainer(stage, tmp_path / str(accumulate), 0, {"recipe": {}})
        batches, _ = stage.host_step(1, 0, 1)
        parameters = stage.module.trainable_parameters()
        found.append(trainer._gradients(parameters, batches)[1])
    one, four = found
    for name in ("tokens", "row_tokens"):
        assert_equal(four[name], one[name])
    # float32: shares times counts, added up in another order
    assert_close(four["expert_tokens"], one["expert_tokens"], atol=1e-3)
    layers, experts = one["expert_tokens"].shape
    assert layers >= 1 and experts > 1
    assert_close(
        one["expert_tokens"].sum(axis=1), mx.full(layers, one["row_tokens"]), atol=1e-3
    )


# --- Questions -----------------------------------------------------------------------


def test_the_last_answer_is_expected():
    def turn(role, content):
        return {"role": role, "content": content}

    messages = [
        *(turn("user", "<image> A?"), turn("assistant", "a")),
        *(turn("user", "and <image> B?"), turn("assistant", "b")),
        turn("user", "<image> thanks"),
    ]
    found = question_of(Sample(messages, ["1.png", "2.png", "3.png"], "line 1"), 7)
    assert found.messages == messages[:3] and found.expected == "b"
    assert found.images == ["1.png", "2.png"] and found.text == "and   B?"
    assert found.number == 7
    parts_ = [{"type": "image", "image": "4.png"}, {"type": "text", "text": "C?"}]
    found = question_of(
        Sample([turn("user", parts_), turn("assistant", "c")], [], "line 2")
    )
    assert found.images == ["4.png"] and found.text == "C?"
    with pytest.raises(DatasetError, match=r"line 3: the sample has no answer"):
        question_of(Sample([turn("user", "A?")], [], "line 3"))


@pytest.mark.parametrize(
    "answer, right",
    [
        ("A red cat", True),
        ("  a RED\n cat. ", True),
        ("a red cat .", True),
        ("a red cat..", False),
        ("red cat", False),
        ("a red cat!", False),
        ("", False),
    ],
)
def test_which_answers_are_right(answer, right):
    assert is_right(answer, "A red cat.") is right


def test_capitals_of_every_script_and_places():
    assert normalised("STRASSE") == normalised("Straße.")
    assert spread(10, 3) == [0, 3, 6] and spread(2, 5) == [0, 1] and spread(0, 5) == []


def test_examples_are_kept(tmp_path):
    examples = [Example(0, "q", "é", "b"), Example(1, "q", "e", "b", "a")]
    write_examples(tmp_path, examples)
    assert read_examples(tmp_path) == examples
    (tmp_path / "answers.json").write_text('{"examples": [{"number"')
    assert read_examples(tmp_path) == [] == read_examples(tmp_path / "none")


# --- Runs ----------------------------------------------------------------------------


def run(data, out, watch=None, resume=False, until=None, plan=PLAN, **changes):  # noqa: F811
    model, processor = parts(data)
    told, lines = [], []
    settings = {"steps": 6, "batch": 4, "accumulate": 2, "learning_rate": 3e-3}
    done = tune(
        model,
        processor,
        open_train(data),
        out,
        plan,
        TuneSettings(**(settings | changes)),
        base="small",
        valid=open_split(data, "valid"),
        valid_every=3,
        save_every=2,
        resume=resume,
        until=until,
        watch=watch,
        tell=lines.append,
        report=told.append,
    )
    assert done is (until is None)
    return model, told, lines


def test_asking_changes_nothing_of_a_run(data, tmp_path):  # noqa: F811
    """The same weights to the last bit, and no random number is used up."""
    pairs = PairSettings(rank=4, scale=2.0, dropout=0.3)
    plan = Plan(parts=PLAN.parts | {"attention": Target(pairs=pairs)})
    run(data, tmp_path / "plain", plan=plan)
    before = [mx.array(x) for x in mx.random.state]
    mx.eval(before)
    watch = Watch(answer_every=2, answer_samples=3, examples=2)
    run(data, tmp_path / "asked", watch, until=3, plan=plan)
    _, told, lines = run(data, tmp_path / "asked", watch, resume=True, plan=plan)
    for old, new in zip(before, mx.random.state, strict=True):
        assert_equal(new, old)
    for name in ("adapters.safetensors", "tune.safetensors"):
        assert same_file(tmp_path / "plain" / name, tmp_path / "asked" / name)
    assert [now.step for now in told if "task_accuracy" in now.metrics] == [4, 6]
    log = (tmp_path / "asked" / "metrics.jsonl").read_text().splitlines()
    asked = [json.loads(line) for line in log]
    assert [x["step"] for x in asked] == list(range(7))
    with_answers = [x for x in asked if "task_accuracy" in x]
    assert [x["step"] for x in with_answers] == [0, 2, 4, 6]
    assert all(x["task_samples"] == 3 for x in with_answers)
    assert not any("before training" in line for line in lines)  # it was asked then


def test_a_model_that_has_learned_gives_the_answers(data, tmp_path):  # noqa: F811
    """Measured in the middle of training, with the weights of that step."""
    notes = {"wandb": {"id": "x"}}
    begun = []
    watch = Watch(
        answer_every=20,
        answer_samples=4,
        examples=3,
        notes=notes,
        begun=lambda: begun.append((tmp_path / "run" / "run.json").exists()),
    )
    longer = {"steps": 60, "batch": 8, "learning_rate": 2e-2}
    model, told, lines = run(data, tmp_path / "run", watch, **longer)
    assert begun == [True] and not model.training
    assert json.loads((tmp_path / "run" / "run.json").read_text())["wandb"] == {
        "id": "x"
    }
    rights = [m["task_right"] for now in told if "task_right" in (m := now.metrics)]
    assert "before training: 0 of 4 answers right" in lines
    assert len(rights) == 3 and rights[-1] == 4, rights
    examples = read_examples(tmp_path / "run")
    assert [e.number for e in examples] == [0, 1, 2]
    assert [is_right(e.after, e.expected) for e in examples] == [True] * 3
    assert not any(is_right(e.before, e.expected) for e in examples)
    load = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").open()][-1]
    assert all(
        sum(layer) == pytest.approx(1, abs=1e-3) for layer in load["expert_load"]
    )


def test_examples_of_another_valid_file_are_asked_anew(data, tmp_path):  # noqa: F811
    out, watch = tmp_path / "run", Watch(examples=2)
    run(data, out, watch, until=2)
    first = read_examples(out)
    assert len(first) == 2 and all(e.after is None for e in first)
    write_examples(out, [Example(0, "another?", "x", "y")])
    run(data, out, watch, resume=True)
    found = read_examples(out)
    assert [e.before for e in found] == [e.before for e in first]
    assert all(e.after is not None for e in found)


def test_without_held_out_samples_there_is_no_task_accuracy(data, tmp_path):  # noqa: F811
    model, processor = parts(data)
    with pytest.raises(DatasetError, match=r"needs a valid\.jsonl"):
        tune(
            model,
            processor,
            open_train(data),
            tmp_path / "run",
            PLAN,
            TuneSettings(steps=2),
            watch=Watch(answer_every=1),
        )
    assert not (tmp_path / "run").exists()


def test_a_training_model_is_put_back(data):  # noqa: F811
    stage = stage_of(data)
    samples = open_split(data, "valid")
    before = dict(tree_flatten(stage.module.parameters()))
    assert task_accuracy(stage, samples, 3)[1] == 3 and stage.module.training
    for name, array in tree_flatten(stage.module.parameters()):
        assert_equal(array, before[name])
    limit = TuneSettings(steps=1, max_tokens=16)
    stage.settings = limit
    with pytest.raises(DatasetError, match=r"line \d: the sample has"):
        task_accuracy(stage, samples, 3)
    assert stage.module.training
