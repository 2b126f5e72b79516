"""mm1-tiny's evaluation and assembly: counting, questions, tables, the commands."""

import json
import random
from pathlib import Path

import pytest
from mlx.utils import tree_flatten, tree_map
from small_tokenizers import sentencepiece_model

from examples.mm1_tiny import assemble, elsewhere, evaluate, photos
from examples.mm1_tiny.scoring import (
    GOALS,
    grouped,
    markdown,
    missed,
    tally,
    wilson,
)
from examples.mm1_tiny.tasks import SCENE_TASKS, TASKS
from helpers import (
    ROOT,
    assert_close,
    assert_equal,
    assert_fails,
    needs,
    run_here,
    run_python,
)
from mm1_mlx.errors import DatasetError

# --- counting ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "right, n, low, high",
    [  # from the closed form, worked out by hand at z = 1.96 for 0 and n
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (485, 500, 0.9511, 0.9817),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson(right, n, low, high):
    found = wilson(right, n)
    assert found == pytest.approx((low, high), abs=5e-5)
    assert 0 <= found[0] <= found[1] <= 1


def test_wilson_is_the_interval_whose_ends_reject_the_share():
    """By its definition: |p - share| = z sqrt(p (1 - p) / n) at both ends."""
    for right, n in ((3, 17), (160, 161), (1, 500)):
        for p in wilson(right, n):
            z = abs(p - right / n) / (p * (1 - p) / n) ** 0.5
            assert z == pytest.approx(1.959964, abs=1e-4)


def test_tallies_by_group():
    outcomes = [True, False, True, True]
    groups = [{"by": "a", "in": "x"}, {"by": "b"}, {"by": "a"}, {}]
    found = grouped(outcomes, groups)
    assert list(found) == ["by", "in"]
    assert found["by"] == {"a": tally([True, True]), "b": tally([False])}
    assert found["in"] == {"x": tally([True])}
    assert tally([True, False])["accuracy"] == 0.5


# --- questions -----------------------------------------------------------------------


def pixels_of(asked) -> list[bytes]:
    return [image.tobytes() for image in asked.images]


@pytest.mark.parametrize("task", ["count", "compare", "held_out"])
def test_questions_are_decided_by_their_seed(task):
    one, same = (evaluate.make_questions(task, 4, 7) for _ in range(2))
    other = evaluate.make_questions(task, 4, 8)
    assert [pixels_of(a) for a in one] == [pixels_of(a) for a in same]
    assert [(a.prompt, a.answer) for a in one] == [(a.prompt, a.answer) for a in same]
    assert [pixels_of(a) for a in one] != [pixels_of(a) for a in other]
    # A longer test starts with the shorter one.
    more = evaluate.make_questions(task, 6, 7)
    assert [a.prompt for a in more[:4]] == [a.prompt for a in one]


def test_wrong_pictures_are_another_questions_of_the_task():
    asked = evaluate.make_questions("compare", 6, 7)
    wrong = evaluate.wrong_pictures("compare", asked, 8)
    own = [pixels_of(a) for a in asked]
    shown = [[image.tobytes() for image in images] for images in wrong]
    assert shown == own[1:] + own[:1]
    assert all(len(images) == 2 for images in wrong)
    assert all(a != b for a, b in zip(own, shown, strict=True))


@needs("skimage")
def test_photographs_are_confused_with_scenes():
    asked = evaluate.make_questions("unknown", 3, 7)
    wrong = evaluate.wrong_pictures("unknown", asked, 8)
    scenes = evaluate.make_questions("count", 3, 8)
    assert [[i.tobytes() for i in x] for x in wrong] == [pixels_of(a) for a in scenes]


def test_renderers_take_turns_and_are_named():
    asked = evaluate.make_questions("elsewhere", 8, 7)
    names = elsewhere.backends()
    expected = [names[i % len(names)] for i in range(8)]
    assert [a.groups["renderer"] for a in asked] == expected
    assert {a.groups["question"] for a in asked} <= set(SCENE_TASKS)


def test_few_shot_asks_the_same_after_more_and_more_pictures():
    by_shots = evaluate.few_shot_questions(5, 7)
    assert list(by_shots) == [0, 1, 2, 3]
    for shots, asked in by_shots.items():
        for i, question in enumerate(asked):
            assert len(question.images) == shots + 1
            assert question.prompt.count("<image>") == shots + 1
            assert question.prompt.endswith("<image>")
            last = by_shots[3][i]
            assert question.answer == last.answer
            assert pixels_of(question)[-1] == pixels_of(last)[-1]
            assert last.prompt.endswith(question.prompt)
    assert by_shots[0][0].prompt == "<image>"


# --- asking --------------------------------------------------------------------------


def test_answers_come_back_in_order_whatever_the_batches():
    asked = [
        evaluate.Asked("p" * (i % 5), "a" * (i % 3), [i] * (1 + i % 2))
        for i in range(23)
    ]
    sizes, counted = [], []

    def answer(prompts, images):
        sizes.append({len(pictures) for pictures in images})
        assert len(prompts) == len(images) <= 4
        return [
            f"{p}{pictures[0]}" for p, pictures in zip(prompts, images, strict=True)
        ]

    shown = [item.images for item in asked]
    found = evaluate.answers_to(answer, asked, shown, 4, counted.append)
    assert found == [f"{a.prompt}{i}" for i, a in enumerate(asked)]
    assert sum(counted) == 23 and max(counted) == 4
    assert sum(len(size) > 1 for size in sizes) <= 1  # one picture, then two


def test_only_the_exact_answer_counts():
    asked = [evaluate.Asked("q", "red", []) for _ in range(4)]
    result = evaluate.score(asked, ["red", "Red", "red.", "a red"])
    assert (result["right"], result["n"]) == (1, 4)
    assert result["commonest_answer"] == 1.0
    assert result["mistakes"][0] == {"prompt": "q", "expected": "red", "found": "Red"}
    many = evaluate.score(asked * 10, ["x"] * 40)
    assert len(many["mistakes"]) == evaluate.MISTAKES


class Oracle:
    """Knows the answer to a picture's question from the pictures it is shown."""

    def __init__(self, *tasks, n=6, seed=7):
        self.known = {}
        for task in tasks:
            for asked in evaluate.make_questions(task, n, seed):
                self.known[asked.prompt, tuple(pixels_of(asked))] = asked.answer

    def __call__(self, prompts, images):
        keys = [
            (prompt, tuple(image.tobytes() for image in pictures))
            for prompt, pictures in zip(prompts, images, strict=True)
        ]
        return [self.known.get(key, "?") for key in keys]


def test_a_model_that_looks_is_told_from_one_that_guesses():
    work = evaluate.Evaluation(Oracle("count", "compare"), n=6, seed=7, batch=4)
    for task in ("count", "compare"):
        result = work.run(task, True, lambda n: None)
        assert result["accuracy"] == 1.0 and result["wrong_image"]["accuracy"] == 0.0
    blind = evaluate.Evaluation(lambda p, i: ["1"] * len(p), n=6, seed=7, batch=4)
    result = blind.run("count", True, lambda n: None)
    assert result["accuracy"] == result["wrong_image"]["accuracy"]
    assert missed(work.report) == []
    assert any("above the wrong picture" in line for line in missed(blind.report))


def test_declining_a_scene_is_counted():
    def decline(prompts, images):
        return [photos.UNKNOWN_ANSWER] * len(prompts)

    work = evaluate.Evaluation(decline, n=3, seed=7, batch=4)
    work.run("count", False, lambda n: None)
    work.run("words", False, lambda n: None)  # no scene
    assert work.report["tasks"]["words"]["says_unknown"] == 3
    known = work.report["says_unknown"]
    assert (known["right"], known["n"]) == (3, 3)
    assert "unknown: said of 3 of 3 scenes" in missed(work.report)


# --- tables --------------------------------------------------------------------------


def made_report() -> dict:
    count = tally([True] * 49 + [False])
    count["wrong_image"] = tally([True] * 10 + [False] * 40)
    other = tally([True, False])
    other["groups"] = {"renderer": {"numpy": tally([True]), "skia": tally([False])}}
    few = {
        str(s): {
            **tally([True] * s + [False]),
            "groups": {"named": {"red": tally([s > 0])}},
        }
        for s in (0, 1)
    }
    return {
        "n": 50,
        "tasks": {"count": count, "elsewhere": other},
        "says_unknown": tally([False] * 100),
        "few_shot": few,
    }


def test_the_tables():
    text = markdown(made_report())
    lines = text.splitlines()
    assert lines[2] == (
        "| count | how many things | 98.0% | 89.5 to 99.6 | 20.0% | 97.0% | 50 |"
    )
    assert "| numpy | 100.0% | 20.7 to 100.0 | 1 |" in lines
    assert "Of 100 scenes, it said of 0 that it does not know" in text
    assert "| red | 0.0% | 100.0% |" in lines
    assert missed(made_report()) == ["elsewhere: 50.0%, goal 93.0%"]


def test_every_goal_is_a_task():
    assert set(GOALS) <= set(TASKS)
    assert all(task in GOALS for task in SCENE_TASKS)


# --- the commands --------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A run of mm1-tiny's own size that has not learned anything yet."""
    from mm1_mlx.models.mm1 import MM1
    from mm1_mlx.training.pretraining import initialize
    from mm1_mlx.training.recipe import read_recipe
    from mm1_mlx.training.state import save_state

    folder = tmp_path_factory.mktemp("run")
    recipe = read_recipe(ROOT / "examples" / "mm1_tiny" / "recipe.json")
    model = MM1(recipe.model)
    initialize(model, 0)
    trees = {"parameters": model.parameters()}
    save_state(folder / "joint.safetensors", trees, {"step": 12})
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    return folder


@pytest.fixture(scope="module")
def assembled(run_folder) -> Path:
    out = run_folder / "model"
    assert assemble.main(["--run", str(run_folder), "--out", str(out)]) == 0
    return out


def test_the_assembled_folder_is_the_run(run_folder, assembled):
    import mlx.core as mx

    from mm1_mlx import load
    from mm1_mlx.training.state import load_state

    model, processor = load(assembled)
    trees, _ = load_state(run_folder / "joint.safetensors")
    stored = dict(tree_flatten(trees["parameters"]))
    for name, array in tree_flatten(model.parameters()):
        assert_equal(array, stored[name].astype(mx.float16).astype(mx.float32), name)
    assert model.config.extra["joint_steps"] == 12
    assert processor.chat_template is not None
    ids = processor("How many?", images=[photo()]).input_ids.tolist()[0]
    start = ids.index(5)  # <user>, then the picture
    assert ids[0] == 1 and ids[start + 1 : start + 18] == [4] * 16 + [ids[start + 17]]
    assert ids[-1] == 6  # <assistant>


def test_the_mean_of_runs(run_folder, tmp_path):
    from mm1_mlx import load
    from mm1_mlx.training.state import load_state, save_state

    trees, facts = load_state(run_folder / "joint.safetensors")
    trees["parameters"] = tree_map(lambda array: 3 * array, trees["parameters"])
    (tmp_path / "other").mkdir()
    save_state(tmp_path / "other" / "joint.safetensors", trees, facts)
    out = tmp_path / "model"
    flags = ["--run", str(run_folder), "--average", str(tmp_path / "other")]
    assert assemble.main([*flags, "--out", str(out)]) == 0
    model, _ = load(out)
    stored = dict(tree_flatten(load_state(run_folder / "joint.safetensors")[0]))
    for name, array in tree_flatten(model.parameters()):
        # float16 keeps eleven bits
        twice = 2 * stored[f"parameters.{name}"]
        assert_close(array, twice, atol=1e-6, rtol=2**-11)
    assert model.config.extra["mean_of_runs"] == 2


def photo():
    from PIL import Image

    return Image.new("RGB", (20, 30), "red")


def test_assembly_gives_the_same_bytes_every_time(run_folder, assembled, tmp_path):
    again = tmp_path / "again"
    done = run_python(
        "-m", "examples.mm1_tiny.assemble", "--run", run_folder, "--out", again
    )
    assert done.returncode == 0 and done.stdout == f"{again}\n", done.stderr
    names = sorted(path.name for path in assembled.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    for name in names:
        assert (assembled / name).read_bytes() == (again / name).read_bytes(), name


def test_the_card_has_the_tables_and_the_commands(assembled, tmp_path):
    result = tmp_path / "result.json"
    result.write_text(json.dumps(made_report()))
    found = tmp_path / "found.json"
    found.write_text(json.dumps({"results": made_abilities()}))
    arguments = ["--out", str(assembled), "--card", str(result)]
    arguments += ["--abilities", str(found)]
    assert assemble.main([*arguments, "--trained", "In two hours on two cores."]) == 0
    card = (assembled / "README.md").read_text()
    assert "{{" not in card
    assert "| count | how many things | 98.0% |" in card
    assert "- elsewhere: 50.0%, goal 93.0%" in card
    assert made_abilities_table() in card
    assert "python -m mm1_mlx.pretrain examples/mm1_tiny/recipe.json" in card
    assert card.endswith("In two hours on two cores.\n") and "MIT" in card
    assert "16 tokens per picture" in card
    guide = (ROOT / "examples" / "mm1_tiny" / "README.md").read_text()
    assert assemble.COMMANDS in guide


def made_abilities() -> list[dict]:
    def of(task, total, groups=None):
        interval = {"low": total - 3, "high": total + 3}
        return {
            "task": task,
            "n": 500,
            "total": total,
            "groups": groups or {},
        } | interval

    return [
        of("tiny_count", 99.0),  # has its line in the other table
        of("tiny_naming_shuffled", 33.0),
        of("tiny_naming_right", 80.04),
        of("tiny_naming_none", 5.0),
        of("tiny_small_native", 30.5),
        of("tiny_small_dynamic", 60.0),
        of("tiny_box", 60.0),
        of("tiny_smaller_count", 70.0, {"0.1": 60.4, "0.2": 79.6}),
        of("tiny_smaller_colour", 90.0, {"0.2": 95.0, "0.1": 85.0}),
    ]


def made_abilities_table() -> str:
    from examples.mm1_tiny.evaluation import ABILITIES

    right, shuffled, none, tiles, plain, box, count, colour = (
        ABILITIES[name]
        for name in (
            *("naming_right", "naming_shuffled", "naming_none"),
            *("small_dynamic", "small_native"),
            *("box", "smaller_count", "smaller_colour"),
        )
    )
    gaps = "47.0 (42.8 to 51.3)", "29.5 (25.3 to 33.7)"
    return f"""\
| naming_right | {right} | 80.0% | 77.0 to 83.0 | {shuffled} | 33.0% | {gaps[0]} | 500 |
|  |  |  |  | {none} | 5.0% | 75.0 (70.8 to 79.3) | 500 |
| small_dynamic | {tiles} | 60.0% | 57.0 to 63.0 | {plain} | 30.5% | {gaps[1]} | 500 |
| box | {box} | 60.0% | 57.0 to 63.0 |  |  |  | 500 |
| smaller_count | {count} | 70.0% | 67.0 to 73.0 |  |  |  | 500 |
| smaller_colour | {colour} | 90.0% | 87.0 to 93.0 |  |  |  | 500 |

| | smaller_count | smaller_colour |
|---|---|---|
| 0.1 | 60% | 85% |
| 0.2 | 80% | 95% |

Below its goal:

- small_dynamic is 29.5 points above small_native, not 30
"""


def test_what_cannot_be_assembled(run_folder, assembled, tmp_path):
    def command(*args):
        return run_here(*args, main=assemble.main)

    assert_fails(command("--run", tmp_path), r"There is no checkpoint .*joint\.safete")
    done = command("--run", run_folder, "--out", tmp_path / "x", "--tokenizer", "no")
    assert_fails(done, "There is no sentencepiece model no")
    beside = "--abilities", tmp_path / "abilities.json"
    beside[1].write_text('{"results": []}')
    done = command("--card", tmp_path / "absent.json", "--out", assembled, *beside)
    assert_fails(done, r"absent\.json is not a result of evaluate")
    (tmp_path / "wrong.json").write_text("{}")
    done = command("--card", tmp_path / "wrong.json", "--out", assembled, *beside)
    assert_fails(done, r"evaluate --json")
    (tmp_path / "right.json").write_text(json.dumps(made_report()))
    arguments = "--card", tmp_path / "right.json", "--out", assembled
    done = command(*arguments, "--abilities", tmp_path / "wrong.json")
    assert_fails(done, r"wrong\.json is not a result\.json of python -m mm1_mlx\.eva")
    done = command("--card", tmp_path / "wrong.json", "--out", assembled)
    assert_fails(done, "--card goes with --abilities RESULT", code=2)
    done = command("--card", tmp_path / "wrong.json", "--out", tmp_path)
    assert_fails(done, r"There is no model folder .*Assemble it first")


def test_the_evaluation_command(run_folder, assembled, tmp_path):
    out, tables = tmp_path / "out.json", tmp_path / "out.md"
    done = run_python(
        *("-m", "examples.mm1_tiny.evaluate", "--model", assembled, "-n", 2),
        *("--tasks", "colour", "count", "few_shot", "--wrong-image", "--check"),
        *("--json", out, "--markdown", tables),
    )
    assert done.returncode == 1  # it has learned nothing, and --check was given
    lines = done.stderr.splitlines()
    assert lines[0].startswith("count: 0.0% [0.0, 65.8], wrong picture")
    assert "below its goal: count: 0.0%, goal 97.0%" in lines
    report = json.loads(out.read_text())
    assert list(report["tasks"]) == ["count", "colour"] and report["complete"]
    assert list(report["few_shot"]) == ["0", "1", "2", "3"]
    assert tables.read_text() == done.stdout == markdown(report)
    done = run_python(
        *("-m", "examples.mm1_tiny.evaluate", "--model", assembled, "-n", 2),
        *("--weights", run_folder / "joint.safetensors", "--tasks", "count"),
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--tasks", "cuont"), r"no task 'cuont'; did you mean 'count'\?"),
        (("--json", "/absent/a.json"), r"no folder /absent for a\.json"),
        (("--model", "/absent"), r"no model or folder '/absent'"),
    ],
)
def test_what_cannot_be_evaluated(arguments, message):
    assert_fails(run_here(*arguments, main=evaluate.main), message)


def test_ctrl_c_keeps_the_tasks_that_are_done(monkeypatch, tmp_path, capsys):
    oracle = Oracle("count", n=2, seed=1000)

    def answer(prompts, images):
        if all(key[0] not in prompts for key in oracle.known):
            raise KeyboardInterrupt
        return oracle(prompts, images)

    monkeypatch.setattr(evaluate, "load_for", lambda *_: (None, None))
    monkeypatch.setattr(evaluate, "answerer", lambda *_: answer)
    out = tmp_path / "out.json"
    code = evaluate.main(["-n", "2", "--tasks", "count", "caption", "--json", str(out)])
    assert code == 130
    report = json.loads(out.read_text())
    assert list(report["tasks"]) == ["count"] and report["complete"] is False
    assert report["tasks"]["count"]["accuracy"] == 1.0
    assert "| count |" in capsys.readouterr().out


def test_an_unknown_task_in_the_library_call():
    with pytest.raises(DatasetError, match="The tasks are count, "):
        evaluate._chosen(["x"])
    assert random.Random(0)  # tasks keep their order, whatever was typed
    assert evaluate._chosen(["words", "count"]) == ["count", "words"]
