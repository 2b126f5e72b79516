"""`python -m mm1_mlx.evaluate`: the command line, kills, reports, wrong inputs."""

import json
import signal
import subprocess
import sys
import time

import pytest
from evaluation_kit import COLOUR, write_dataset

import mm1_mlx
from helpers import ROOT, assert_fails, clean_environment, need_tiny, run_cli, run_here
from mm1_mlx.errors import DatasetError, UsageError
from mm1_mlx.evaluation.report import Report
from mm1_mlx.evaluation.samples import Score
from mm1_mlx.evaluation.table import find_tasks

KIT = ROOT / "tests" / "evaluation_kit.py"
TINY = ("--model", "mm1-tiny", "--tasks-from", KIT)


def started(*args, **settings):
    """The command as a user starts it."""
    return run_cli("mm1_mlx.evaluate", *TINY, *args, **settings)


def command(*args, **settings):
    """The command in this process."""
    return run_here("evaluate", *TINY, *args, **settings)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    need_tiny()
    return write_dataset(tmp_path_factory.mktemp("data") / "colour", 24)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run in one piece, with two shot counts and wrong pictures."""
    out = tmp_path_factory.mktemp("whole")
    done = started(
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
    done = started(*arguments, *out, env=slow)
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


@pytest.mark.parametrize("flags, anew", [((), ""), (("--force",), " without --force")])
def test_ctrl_c_says_how_to_go_on(data, tmp_path, flags, anew):
    from helpers import heed_ctrl_c

    file = tmp_path / "colour-0shot.jsonl"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "mm1_mlx.evaluate", *map(str, TINY)),
            *("--task", "colour", "--data", str(data), "--batch-size", "2"),
            *("--output", str(tmp_path), *flags),
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
        f"stopped; the same command{anew} goes on from {tmp_path}"
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
    done = started("--task", "colour", "--data", place, "--output", out)
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
    assert_fails(run_here("evaluate", *arguments), message, code=2)


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


def test_the_verb_and_the_door_share_a_name(data, tmp_path):
    import mm1_mlx.evaluate as door

    assert callable(door) and callable(mm1_mlx.evaluate)
    model, processor = mm1_mlx.load("mm1-tiny")
    given = {"data": data, "limit": 3, "output": tmp_path}
    result = mm1_mlx.evaluate(model, processor, COLOUR, **given)
    assert result.n == 3 and isinstance(result.score, Score)
    assert json.loads((tmp_path / "result.json").read_text())["model"] == "mm1-tiny"
    assert (tmp_path / "report.md").read_text().startswith("# mm1-tiny\n")
    with pytest.raises(DatasetError, match="There is no task 'x'"):
        mm1_mlx.evaluate(model, processor, "x")
