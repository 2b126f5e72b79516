"""Which tasks evaluate knows: benchmarks, mm1-tiny's own, those of a user's module."""

import re

import pytest
from dataset_kit import cell, put, write_table
from PIL import Image
from test_evaluate_command import KIT, records

from helpers import (
    ROOT,
    assert_fails,
    need,
    need_tiny,
    needs,
    run_cli,
    run_here,
    run_python,
)
from mm1_mlx.errors import DatasetError
from mm1_mlx.evaluation.datasets import places
from mm1_mlx.evaluation.table import find_tasks, tasks_from


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


MINE = """
from mm1_mlx.evaluation.metrics.exact import exact_accuracy
from mm1_mlx.evaluation.samples import Sample, Task

def read(where, split):
    yield Sample(id="1", question="What?", answers=("a",))

TASKS = [
    Task(
        name="mine",
        summary="",
        read=read,
        split="val",
        shot_split=None,
        prompt=lambda sample: sample.question,
        shot_prompt=None,
        target=lambda sample: sample.answers[0],
        clean=lambda text, sample: text,
        metric=exact_accuracy,
        needs_data=False,
    )
]
"""


@pytest.mark.parametrize(
    "right, wrong, message",
    [
        ("TASKS = [", "TASKS = ]", r"^/.*mine\.py, line 8: SyntaxError: [^(]*$"),
        ("TASKS = [", "1 / 0\nTASKS = [", r"line 8: ZeroDivisionError: division by"),
        ('summary="",', "", r"line 9: TypeError: .* argument: 'summary'$"),
        (
            "lambda text, sample",
            "lambda text",
            r"line 18: the task 'mine': clean takes \(text\), but is called with "
            r"\(text, sample\)\.$",
        ),
        ("metric=exact_accuracy", "metric=None", r"metric is None, but is called with"),
        ('summary="",', 'summary="", settings={"foo": 1},', "unknown settings"),
    ],
)
def test_a_mistake_in_a_module_is_named_with_its_line(tmp_path, right, wrong, message):
    path = tmp_path / "mine.py"
    path.write_text(MINE.replace(right, wrong))
    with pytest.raises(DatasetError, match=message):
        tasks_from(str(path))


@pytest.mark.parametrize(
    "right, wrong, message",
    [
        ("yield Sample(", "yield Sampl(", r"mine\.py, line 6: NameError: name 'Sampl'"),
        ("sample.question,", "sample.text,", r"mine\.py, line 15: AttributeError: "),
        ("sample: text,", "sample: text[99],", r"mine\.py, line 18: IndexError: "),
        ("yield Sample(", "yield str(", r"mine\.py, line 6: TypeError: "),
        ('yield Sample(id="1", question="What?", answers=("a",))', "yield 1", "gave 1"),
        ("metric=exact_accuracy", "metric=len", r"its metric gave 1, but must give a"),
        ('yield Sample(id="1", question="What?", answers=("a",))', "pass", "gave None"),
        (
            'answers=("a",)',
            'answers="a"',
            r"answers of sample 1 are 'a', but must be a t",
        ),
    ],
)
def test_a_mistake_in_what_a_module_does_is_no_bug_of_ours(
    tmp_path, right, wrong, message
):
    need_tiny()
    path = tmp_path / "mine.py"
    path.write_text(MINE.replace(right, wrong))
    done = run_here(
        *("evaluate", "--model", "mm1-tiny", "--tasks-from", path, "--task", "mine"),
        *("--output", tmp_path / "out"),
    )
    assert_fails(done, message)
    assert "bug" not in done.stderr


def test_a_mistake_in_a_file_beside_the_module_is_no_bug_of_ours(tmp_path, monkeypatch):
    need_tiny()
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "reading.py").write_text("def read(where, split):\n    yield absent\n")
    imported = MINE.replace("TASKS = [", "from reading import read\n\nTASKS = [")
    (tmp_path / "mine.py").write_text(imported)
    done = run_here(
        *("evaluate", "--model", "mm1-tiny", "--tasks-from", "mine", "--task", "mine"),
        *("--output", tmp_path / "out"),
    )
    assert_fails(done, r"reading\.py, line 2: NameError: name 'absent'")
    assert "bug" not in done.stderr


def test_the_readmes_tasks_run_as_printed(tmp_path, monkeypatch):
    """On a folder of pictures, and on a dataset of the hub."""
    need("pyarrow")
    need_tiny()
    text = (ROOT / "mm1_mlx" / "evaluation" / "README.md").read_text("utf-8")
    code = next(
        c for c in re.findall(r"```python\n(.*?)```", text, re.S) if "TASKS" in c
    )
    commands = re.findall(r"^python -m mm1_mlx\.(.*--task colours .*)$", text, re.M)
    (tmp_path / "my_tasks.py").write_text(code)
    local, hub = tmp_path / "FOLDER", tmp_path / "hub"
    for colour in ("red", "green", "blue"):
        put(local, f"test/{colour}_1.png", colour)
    rows = [{"image": cell(colour), "colour": colour} for colour in ("red", "blue")]
    write_table(hub / "data" / "test-00000-of-00001.parquet", rows)

    def download(repo, revision, choose):
        assert repo == "you/colours"
        return hub

    monkeypatch.setattr(places, "download_dataset", download)
    found = [run_here(*command.split(), cwd=tmp_path) for command in commands]
    for done, count in zip(found, (3, 2), strict=True):
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("colours 0-shot: ")
        assert done.stdout.endswith(f", {count} samples\n")


def test_a_package_of_tasks_is_named_by_its_file(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").write_text("from my_package.a import x")
    (tmp_path / "my_package" / "a.py").write_text("\nimport no_such_thing\n")
    with pytest.raises(DatasetError, match=r"a\.py, line 2: ModuleNotFoundError: "):
        tasks_from("my_package")


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
    done = run_here(
        *("evaluate", "--model", "mm1-tiny", "--task", "tiny_count"),
        *("tiny_few_shot_2", "--limit", 6, "--output", tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tiny_count 0-shot: ")
    _, *kept = records(tmp_path / "tiny_few_shot_2-0shot.jsonl")
    assert all(len(r["images"]) == 3 for r in kept)
    image = kept[0]["images"][0]
    with Image.open(tmp_path / image["copy"]) as small:
        assert max(small.size) <= 256
