"""`python -m mm1_mlx.evaluate`: the command line, kills, reports, wrong inputs."""

import json
import signal
import subprocess
import sys
import time

import pytest
from evaluation_kit import COLOUR, write_dataset
from PIL import Image

import mm1_mlx
from helpers import (
    ROOT,
    assert_fails,
    clean_environment,
    need_tiny,
    needs,
    run_cli,
    run_python,
)
from mm1_mlx.errors import DatasetError, UsageError
from mm1_mlx.evaluation import report
from mm1_mlx.evaluation.report import Report, failures, markdown
from mm1_mlx.evaluation.samples import Sample, Score
from mm1_mlx.evaluation.sheet import wrapped
from mm1_mlx.evaluation.table import find_tasks, tasks_from

KIT = ROOT / "tests" / "evaluation_kit.py"
TINY = ("--model", "mm1-tiny", "--tasks-from", KIT)


def command(*args, **settings):
    return run_cli("mm1_mlx.evaluate", *TINY, *args, **settings)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    need_tiny()
    return write_dataset(tmp_path_factory.mktemp("data") / "colour", 24)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run in one piece, with two shot counts and wrong pictures."""
    out = tmp_path_factory.mktemp("whole")
    done = command(
        *("--task", "colour", "--data", data, "--shots", "0,2", "--batch-size", 4),
        *("--limit", 20, "--wrong-image", "--output", out),
    )
    assert done.returncode == 0, done.stderr
    return out, done


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_leaves_answers_results_and_a_report(whole, data):
    out, done = whole
    rows = [(0, False), (0, True), (2, False), (2, True)]
    names = ["colour 0-shot", "colour 0-shot, wrong pictures"]
    names += ["colour 2-shot", "colour 2-shot, wrong pictures"]
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == names
    assert all(line.endswith("20 samples") for line in lines)
    assert done.stderr.endswith(f"{out / 'report.md'}\n")
    result = json.loads((out / "result.json").read_text())
    assert result["model"] == "mm1-tiny" and result["adapter"] is None
    assert [(r["shots"], r["wrong_images"]) for r in result["results"]] == rows
    first = result["results"][0]
    assert first["n"] == 20 and first["failed"] == 0 and first["split"] == "val"
    assert first["low"] <= first["total"] <= first["high"]
    assert first["timing"]["answered"] == 20 and first["timing"]["tokens"] > 0
    assert first["versions"]["mm1_mlx"] == mm1_mlx.__version__
    header, *kept = records(out / "colour-0shot.jsonl")
    assert header["settings"]["data"] == str(data) and len(kept) == 20
    for record in kept:
        (image,) = record["images"]
        assert image["path"].startswith(str(data))
        assert record["score"] == float(record["answer"] in record["expected"])
    total = 100 * sum(r["score"] for r in kept) / 20
    assert first["total"] == pytest.approx(total)
    text = (out / "report.md").read_text()
    assert f"| colour | val | 0 | {total:.1f} |" in text
    assert "| colour | val | 2, wrong pictures |" in text


def test_mm1_tiny_sees_the_colours_and_wrong_pictures_take_that_away(whole):
    """Six colours: any good mm1-tiny knows them, and nobody can guess them."""
    rows = json.loads((whole[0] / "result.json").read_text())["results"]
    assert rows[0]["total"] >= 90 and rows[1]["total"] <= 30


def test_shots_stand_before_the_question(whole):
    _, *kept = records(whole[0] / "colour-2shot.jsonl")
    for record in kept:
        roles = [message["role"] for message in record["prompt"]]
        assert roles == ["user", "assistant", "user", "assistant", "user"]
    assert len({json.dumps(record["prompt"][:4]) for record in kept}) == 1


def test_the_same_command_asks_nothing_again(whole, data):
    out, _ = whole
    before = {p.name: p.read_bytes() for p in out.glob("*.jsonl")}
    again = command(
        *("--task", "colour", "--data", data, "--batch-size", 4, "--limit", 20),
        *("--output", out, "--json"),
    )
    assert again.returncode == 0, again.stderr
    told = json.loads(again.stdout)
    assert told["timing"]["answered"] == 0
    assert "colour 0-shot: goes on after 20 of 20" in again.stderr
    assert {p.name: p.read_bytes() for p in out.glob("*.jsonl")} == before
    rows = json.loads((out / "result.json").read_text())["results"]
    assert len(rows) == 4  # the others stay in the report


def test_a_killed_run_goes_on_and_gives_the_same_file(data, tmp_path):
    """kill -9 in the midst: the second run gives what one in a piece does."""
    arguments = ("--task", "colour", "--data", data, "--batch-size", "2")
    slow = {"EVALUATION_KIT_SLOW": "0.05"}
    file = tmp_path / "part" / "colour-0shot.jsonl"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "mm1_mlx.evaluate", *map(str, TINY)),
            *map(str, arguments),
            *("--output", str(file.parent)),
        ],
        env=clean_environment(**slow),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not file.exists() or file.read_bytes().count(b"\n") < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    lines = file.read_bytes().count(b"\n") - 1
    assert 4 <= lines < 24  # killed in time
    slow["EVALUATION_KIT_SLOW"] = "0"
    out = ("--output", file.parent)
    done = command(*arguments, *out, env=slow)
    assert done.returncode == 0, done.stderr
    assert f"goes on after {lines - lines % 2} of 24" in done.stderr
    done = command(*arguments, "--output", tmp_path / "whole", env=slow)
    assert done.returncode == 0, done.stderr
    assert file.read_bytes() == (tmp_path / "whole" / file.name).read_bytes()
    both = [
        json.loads((tmp_path / name / "result.json").read_text())["results"]
        for name in ("part", "whole")
    ]
    for (row,) in both:
        del row["timing"]
    assert both[0] == both[1]


def test_ctrl_c_says_how_to_go_on(data, tmp_path):
    from helpers import heed_ctrl_c

    file = tmp_path / "colour-0shot.jsonl"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "mm1_mlx.evaluate", *map(str, TINY)),
            *("--task", "colour", "--data", str(data), "--batch-size", "2"),
            *("--output", str(tmp_path)),
        ],
        env=clean_environment(EVALUATION_KIT_SLOW="0.1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=heed_ctrl_c,
        text=True,
    )
    while not file.exists() or file.read_bytes().count(b"\n") < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130 and not out
    assert error.splitlines()[-1] == (
        f"stopped; the same command goes on from {tmp_path}"
    )


# --- what is wrong with data --------------------------------------------------------


def test_broken_pictures_are_counted_and_named(data, tmp_path):
    """One is no picture and one is missing: they are told, the others answered."""
    place = write_dataset(tmp_path / "data", 6)
    (place / "val2.png").write_bytes(b"no picture")
    (place / "val4.png").unlink()
    done = command(
        *("--task", "colour", "--data", place, "--output", tmp_path / "out"),
    )
    assert done.returncode == 0, done.stderr
    assert "6 samples, 2 of them could not be asked" in done.stdout
    text = (tmp_path / "out" / "report.md").read_text()
    assert "colour, 0-shot: 2 of 6" in text
    assert "| val-2 | val.jsonl:3 |" in text and "| val-4 | val.jsonl:5 |" in text
    assert "They count as wrong." in text
    _, *kept = records(tmp_path / "out" / "colour-0shot.jsonl")
    assert [r["id"] for r in kept if "error" in r] == ["val-2", "val-4"]
    assert "val4.png" in kept[4]["error"]


def test_where_no_picture_can_be_read_nothing_is_reported(tmp_path):
    need_tiny()
    place = write_dataset(tmp_path / "data", 3)
    for i in range(3):
        (place / f"val{i}.png").unlink()
    out = tmp_path / "out"
    done = command("--task", "colour", "--data", place, "--output", out)
    assert_fails(done, r"not one of 3 samples could be asked.*val-0: .*val0\.png")
    assert not (out / "report.md").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--task", "color"), r"There is no task 'color'.*The tasks are .*colour"),
        (("--task", "colour"), r"colour has no usual place on the hub"),
        (("--task", "colour", "--data", "/absent/a/b"), r"--data /absent/a/b is not"),
        (
            ("--task", "no_shots", "--data", "DATA", "--shots", "4"),
            r"no_shots has no few-shot form",
        ),
        (
            ("--task", "colour", "--data", "DATA", "--shots", "8"),
            r"'train' .* has 4 samples, but 8 shots",
        ),
        (("--task", "colour", "--data", "DATA/.."), r"has no val\.jsonl"),
        (("--task", "tiny_nothing"), r"There is no task 'tiny_nothing'"),
        # what the second task or the shots need is read before the model is loaded
        (
            (
                *("--model", "/absent", "--task", "colour", "no_shots"),
                *("--data", "colour=DATA", "no_shots=DATA/.."),
            ),
            r"has no val\.jsonl",
        ),
    ],
)
def test_wrong_inputs(data, arguments, message, tmp_path):
    given = [str(a).replace("DATA", str(data)) for a in arguments]
    done = command(*given, "--output", tmp_path / "out")
    assert_fails(done, message)
    assert not done.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), r"--model is missing"),
        (("--model", "mm1-tiny"), r"--task is missing"),
        (("--shots", "1,x"), r"--shots: must be whole numbers of 0 or more"),
        (("--shots", "-2"), r"--shots"),
        (("--limit", "0"), r"--limit: must be a whole number of 1 or more"),
        (("--prompt-form", "cht"), r"unknown value 'cht'; did you mean 'chat'"),
        (("--resolution", "big"), r"must be native, dynamic or a number of pixels"),
        (("--batchsize", "3"), r"unknown flag '--batchsize'; did you mean"),
    ],
)
def test_wrong_usage(arguments, message):
    assert_fails(run_cli("mm1_mlx.evaluate", *arguments), message, code=2)


def test_pictures_in_tiles(data, tmp_path):
    done = command(
        *("--task", "colour", "--data", data, "--limit", 2, "--output", tmp_path),
        *("--resolution", "dynamic", "--max-tiles", 4),
    )
    assert done.returncode == 0, done.stderr
    header, *kept = records(tmp_path / "colour-0shot.jsonl")
    asked = header["settings"]["generation"]
    assert (asked["resolution"], asked["max_tiles"]) == ("dynamic", 4)
    native = mm1_mlx.load("mm1-tiny")[1]("x", images=["examples/shapes.png"])
    image_tokens = native.image_tokens[0]
    assert all(record["prompt_tokens"] > 2 * image_tokens for record in kept)


def test_places_for_several_tasks(data, tmp_path):
    wrong = command(
        *("--task", "colour", "no_shots", "--data", data, tmp_path, "--limit", 2)
    )
    assert_fails(wrong, "--data names 2 places without a task", code=2)
    write_dataset(tmp_path / "all" / "no_shots", 4)
    done = command(
        *("--task", "colour", "no_shots", "--output", tmp_path / "out"),
        *("--data", tmp_path / "all", f"colour={data}", "--limit", 2),
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out" / "result.json").read_text())["results"]
    assert [row["settings"]["data"] for row in rows] == [
        str(data),
        str(tmp_path / "all" / "no_shots"),
    ]


def places(names, *data):
    from mm1_mlx.evaluate import _places

    return _places(find_tasks(names, [str(KIT)]), list(data))


def test_places_by_short_names_and_with_equals_signs(tmp_path):
    two = ["coco", "colour"]
    assert places(two, "coco=a", "colour=b") == {
        "coco_karpathy_test": "a",
        "colour": "b",
    }
    odd = tmp_path / "limit=4"
    odd.mkdir()
    assert places(["colour"], str(odd)) == {"colour": str(odd)}


@pytest.mark.parametrize(
    "names, data, message",
    [
        (
            ["colour"],
            ["color=a"],
            r"--data color=a: 'color' is not .* \(colour\)",
        ),
        (["colour"], ["pope=a"], r"'pope' is not one of the tasks that are asked here"),
        (["tiny_count"], ["a"], r"--data: tiny_count makes its own samples"),
        (["tiny_count"], ["tiny_count=a"], r"--data: tiny_count makes its own samples"),
    ],
)
def test_places_that_nobody_reads(names, data, message):
    with pytest.raises(UsageError, match=message):
        places(names, *data)


def test_after_a_task_that_fails_the_others_are_asked(data, tmp_path):
    broken = write_dataset(tmp_path / "broken", 2)
    for i in range(2):
        (broken / f"val{i}.png").unlink()
    done = command(
        *("--task", "colour", "no_shots", "--limit", 2, "--output", tmp_path / "out"),
        *("--data", f"colour={broken}", f"no_shots={data}"),
    )
    first, *_, last = done.stderr.splitlines()
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert first.startswith("colour, 0-shot: error: colour: not one of 2 samples")
    assert last == "error: 1 of 2 rows could not be asked, see above"
    assert done.stdout.startswith("no_shots 0-shot: ")
    rows = json.loads((tmp_path / "out" / "result.json").read_text())["results"]
    assert [row["task"] for row in rows] == ["no_shots"]


def test_an_output_that_is_a_file(data, tmp_path, model, processor):
    file = tmp_path / "out"
    file.write_text("")
    done = command("--task", "colour", "--data", data, "--output", file)
    assert_fails(done, r"--output .*out is a file: give a folder", code=2)
    with pytest.raises(DatasetError, match=r"out/a is a file, or lies in one"):
        mm1_mlx.evaluate(model, processor, COLOUR, data=data, output=file / "a")


@pytest.mark.parametrize("results", [[{}], [1], {"a": 1}, None])
def test_damaged_results(tmp_path, results):
    text = {"format": "mm1_mlx results 1", "model": "m", "weights": {}}
    (tmp_path / "result.json").write_text(json.dumps(text | {"results": results}))
    with pytest.raises(DatasetError, match=r"is not a result of this command, or dama"):
        Report(tmp_path, "m", {})


def test_other_settings_on_the_same_folder(whole, data):
    out, _ = whole
    arguments = ("--task", "colour", "--data", data, "--batch-size", 4)
    done = command(*arguments, "--seed", 7, "--output", out)
    assert_fails(done, r"begun with other settings: .*seed \(0 there, 7 now\).*--force")


def test_another_models_folder(whole, tmp_path):
    out, _ = whole
    about = json.loads((out / "result.json").read_text())
    with pytest.raises(DatasetError, match=r"results of another model \(mm1-tiny"):
        Report(out, "other", {"config": "x", "weights": "y"})
    assert Report(out, "other", {"config": "x"}, force=True)._entries == []
    assert len(Report(out, "mm1-tiny", about["weights"])._entries) == 4
    (tmp_path / "result.json").write_text("[]")
    with pytest.raises(DatasetError, match=r"result\.json is not a result of this"):
        Report(tmp_path, "mm1-tiny", about["weights"])


# --- tasks --------------------------------------------------------------------------


def test_the_list_names_every_task_and_its_place():
    done = run_cli("mm1_mlx.evaluate", "--list", "--tasks-from", KIT)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    (line,) = [line for line in lines if line.startswith("colour ")]
    assert "the colour of a circle (val, shots from train; --data)" in line
    assert any(line.startswith("tiny_count ") for line in lines)


@pytest.mark.parametrize(
    "text, message",
    [
        (None, r"There is no file .*mine\.py.*path of its \.py file"),
        ("TASKS = [1]\n", r"has no TASKS, a list of"),
        ("x = 1\n", r"has no TASKS, a list of"),
        ("import no_such_thing\n", r"No module named 'no_such_thing'"),
    ],
)
def test_a_module_without_tasks(tmp_path, text, message):
    if text is not None:
        (tmp_path / "mine.py").write_text(text)
    with pytest.raises(DatasetError, match=message):
        tasks_from(str(tmp_path / "mine.py"))


def test_benchmarks_have_short_names():
    assert [task.name for task in find_tasks(["textvqa", "pope"])] == [
        "textvqa_val",
        "pope",
    ]
    with pytest.raises(DatasetError, match=r"no task 'textvq'\. Did you mean 'textvqa"):
        find_tasks(["textvq"])


def test_a_module_by_its_name(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_own_tasks.py").write_text("from evaluation_kit import TASKS\n")
    assert list(tasks_from("my_own_tasks")) == ["colour", "no_shots"]
    with pytest.raises(DatasetError, match="No module named 'no_such_module'"):
        tasks_from("no_such_module")


def test_the_tasks_of_mm1_tiny_need_a_clone(tmp_path):
    """A link to the package alone stands for an install."""
    assert len(find_tasks(["mm1-tiny"])) > 20
    (tmp_path / "mm1_mlx").symlink_to(ROOT / "mm1_mlx")
    done = run_python(
        *("-m", "mm1_mlx.evaluate", "--model", "mm1-tiny", "--task", "mm1-tiny"),
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert_fails(done, r"task 'mm1-tiny' is made by examples/mm1_tiny.*of a clone")


@needs("skimage")
def test_the_questions_of_mm1_tiny_are_those_of_its_card(tmp_path):
    """The same pictures and answers as examples.mm1_tiny.evaluate asks for."""
    from examples.mm1_tiny import evaluate
    from examples.mm1_tiny.evaluation import SEED

    tasks = {task.name: task for task in find_tasks(["mm1-tiny"])}
    for name in ("count", "compare", "unknown", "elsewhere", "naming_none", "talk"):
        asked = evaluate.make_questions(name, 3, SEED)
        samples = [
            s
            for s, _ in zip(tasks[f"tiny_{name}"].read("", "test"), range(3))  # noqa: B905
        ]
        assert [s.answers[0] for s in samples] == [a.answer for a in asked]
        assert [tasks["tiny_count"].prompt(s) for s in samples] == [
            a.prompt for a in asked
        ]
        for sample, one in zip(samples, asked, strict=True):
            assert [i.tobytes() for i in sample.images] == [
                i.tobytes() for i in one.images
            ]
    shots = next(iter(tasks["tiny_few_shot_3"].read("", "test")))
    assert len(shots.images) == 4
    assert tasks["tiny_small_dynamic"].settings == {"resolution": "dynamic"}
    named = [tasks[f"tiny_naming_{x}"].read("", "test") for x in ("right", "shuffled")]
    right, shuffled = (next(iter(samples)) for samples in named)
    assert right.images[0].tobytes() == shuffled.images[0].tobytes()  # the same ones
    assert right.answers == shuffled.answers
    wrong = next(iter(tasks["tiny_unknown"].read("", "test")))
    scene = evaluate.make_questions("count", 1, SEED + 1)[0]
    assert wrong.fields["wrong_images"][0].tobytes() == scene.images[0].tobytes()


def test_mm1_tinys_tasks_through_the_command(tmp_path):
    need_tiny()
    done = run_cli(
        *("mm1_mlx.evaluate", "--model", "mm1-tiny", "--task", "tiny_count"),
        *("tiny_few_shot_2", "--limit", 6, "--output", tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tiny_count 0-shot: ")
    _, *kept = records(tmp_path / "tiny_few_shot_2-0shot.jsonl")
    assert all(len(r["images"]) == 3 for r in kept)
    image = kept[0]["images"][0]
    with Image.open(tmp_path / image["copy"]) as small:
        assert max(small.size) <= 256


# --- the report ---------------------------------------------------------------------


def made_result(scores, **changes):
    from types import SimpleNamespace

    samples = [
        Sample(id=str(i), question=f"q{i} | a", answers=("x",), images=())
        for i in range(len(scores))
    ]
    kept = [
        {"id": s.id, "prompt": "p", "answer": f"a{i}", "score": score}
        for i, (s, score) in enumerate(zip(samples, scores, strict=True))
    ]
    made = {"task": COLOUR, "samples": samples, "records": kept, "failed": []}
    return SimpleNamespace(**(made | changes))


def test_the_worst_answers_are_shown():
    assert [f.id for f in failures(made_result([1.0, 0.5, 0.0, None, 0.2]), 2)] == [
        "2",
        "4",
    ]
    spread = [f.id for f in failures(made_result([0.0] * 10), 5)]
    assert spread == ["0", "2", "4", "6", "8"]
    assert failures(made_result([1.0, None])) == []
    result = made_result([0.0])
    result.records[0]["error"] = "no picture"
    assert failures(result) == []


def test_the_tables_of_the_report(monkeypatch):
    entry = {
        "task": "t",
        "split": "val",
        "shots": 4,
        "wrong_images": False,
        "n": 10,
        "failed": 1,
        "total": 71.25,
        "low": 60.0,
        "high": None,
        "groups": {"a": 50.0},
        "settings": {
            "data": "d",
            "form": "chat",
            "same_shots": True,
            "seed": 0,
            "generation": {"max_tokens": 8, "stop": ["\n"]},
        },
        "versions": {"mlx": "1"},
        "timing": {"answered": 10, "seconds": 2.0, "tokens_per_second": 5.0},
        "errors": [{"id": "s|1", "error": "a\nb"}],
        "mistakes": {
            "sheet": "t.png",
            "of": 1,
            "listed": [{"id": "1", "question": "q" * 300, "expected": "", "found": ""}],
        },
    }
    tables = {"t": "PUBLISHED"}
    monkeypatch.setattr(report, "published_table", lambda name: tables[name])
    text = markdown({"model": "m", "adapter": "ad", "results": [entry]})
    lines = text.splitlines()
    assert lines[0] == "# m with the adapter ad"
    assert "| t | val | 4 | 71.2 | - | 10 | 1 |" in lines
    assert "| a | 50.0 |" in lines and "PUBLISHED" in lines and "### t" in lines
    assert "| s\\|1 |  | a b |" in lines
    assert "![failures of t, 4-shot](t.png)" in lines
    assert all(len(line) < 400 for line in lines)


def test_text_on_a_sheet_stays_in_its_lines():
    from PIL import ImageFont

    font = ImageFont.load_default(15)
    text = "a question of several words " * 10
    lines = wrapped(text, font, 200, 3)
    assert len(lines) == 3 and lines[-1].endswith("...")
    assert all(font.getlength(line) <= 200 for line in lines)
    long = wrapped("字" * 100, font, 200, 50)
    assert "".join(long) == "字" * 100
    assert all(font.getlength(line) <= 200 for line in long)
    assert wrapped("", font, 200, 3) == [""]


def test_a_sheet_shows_pictures_and_what_cannot_be_read(tmp_path):
    import numpy as np

    from mm1_mlx.evaluation.sheet import Failure, draw_sheet

    red = Image.new("RGB", (40, 40), "red")
    found = [
        Failure("a", (red,), "q", "x", "y"),
        Failure("b", (), "q", "x", ""),
        Failure("c", ("/absent.png", red, red), "q", "x", "y"),
        Failure("d", (red,), "q", "x", "y"),
    ]
    path = tmp_path / "sheet.png"
    draw_sheet(found, path, "title")
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet)
    reds = (pixels == [255, 0, 0]).all(-1)
    assert reds[:300, :380].sum() > 30_000  # in the first cell, made larger
    assert not reds[:300, 380:720].any()  # text only
    assert reds[:300, 740:].sum() > 10_000  # beside the one that is missing
    assert reds[300:, :380].sum() > 30_000


def test_the_verb_and_the_door_share_a_name(data):
    import mm1_mlx.evaluate as door

    assert callable(door) and callable(mm1_mlx.evaluate)
    model, processor = mm1_mlx.load("mm1-tiny")
    result = mm1_mlx.evaluate(model, processor, COLOUR, data=data, limit=3)
    assert result.n == 3 and isinstance(result.score, Score)
    with pytest.raises(DatasetError, match="There is no task 'x'"):
        mm1_mlx.evaluate(model, processor, "x")
