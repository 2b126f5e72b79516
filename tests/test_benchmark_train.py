"""benchmark train: two folders of one model, measured runs, ratios and refusals."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import pytest

from helpers import assert_equal, assert_fails, run_here
from mm1_mlx.benchmarks import train
from mm1_mlx.benchmarks.random_llava import (
    _PEER_TEMPLATE,
    Shape,
    write_llava,
    write_pictures,
    write_texts,
)
from mm1_mlx.benchmarks.train_side import Side, Task, measure
from mm1_mlx.convert.conversion import convert
from mm1_mlx.errors import MM1Error
from mm1_mlx.inputs.jinja import render
from mm1_mlx.inputs.prompts import render_chat
from mm1_mlx.loading import load, load_model
from mm1_mlx.training.conversations import lesson_of, open_train

SMALL = Shape(
    image_size=28,
    vision_width=32,
    vision_layers=2,
    width=32,
    hidden=48,
    layers=2,
    head_size=16,
    vocabulary=600,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Both folders, pictures and texts."""
    folder = tmp_path_factory.mktemp("llava")
    folder.joinpath("count").write_text(str(write_llava(folder, SMALL)))
    write_pictures(folder / "data", 3, SMALL.image_size)
    write_texts(folder / "texts", 4)
    return folder


def test_the_usual_model_has_about_200m_parameters_and_samples_600_tokens():
    from mm1_mlx.memory import count_parameters

    config = Shape().config()
    total = sum(part.total for _, part in count_parameters(config).items())
    assert 190e6 < total < 220e6
    assert (336 // config.vision_config.patch_size) ** 2 == 576


def test_both_folders_hold_the_same_numbers(folder, tmp_path):
    ours = load_model(folder / "ours")
    convert(folder / "mlx-vlm", tmp_path / "back", dtype="float32")
    theirs = load_model(tmp_path / "back")
    ids = mx.array([[5, 9, 4, 4, 4, 4, 20, 30]])
    pixels = mx.random.normal((1, 28, 28, 3))
    assert_equal(ours(ids, pixels), theirs(ids, pixels))
    arrays = mx.load(str(folder / "mlx-vlm" / "model.safetensors"))
    count = int((folder / "count").read_text())
    assert sum(array.size for array in arrays.values()) == count
    biases = [array for name, array in arrays.items() if name.endswith("bias")]
    assert biases and all(mx.any(array).item() for array in biases)


def test_both_templates_write_the_same_text(folder):
    asked = [{"role": "user", "content": "<image>\nWhat is it?"}]
    said = [*asked, {"role": "assistant", "content": "A star."}]
    parts = [{"type": "text", "text": "What is it?"}, {"type": "image"}]
    lists = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "A star."}]},
    ]
    for messages, theirs, prompt in ((asked, lists[:1], True), (said, lists, False)):
        ours = render_chat(messages, "llava-hf", prompt, eos_token="</s>")
        found = render(_PEER_TEMPLATE, messages=theirs, add_generation_prompt=prompt)
        assert found == ours
    written = (folder / "mlx-vlm" / "chat_template.jinja").read_text()
    assert written == _PEER_TEMPLATE


def test_every_id_has_a_text(folder):
    """mlx-vlm fails at one without."""
    _, processor = load(folder / "ours")
    last = SMALL.vocabulary - 1
    assert [processor.tokenizer.decode([i]) for i in (last - 1, last)] == [
        f"w{last - 1}",
        f"w{last}",
    ]


def test_samples_are_what_they_should_be(folder):
    _, processor = load(folder / "ours")
    pictures = open_train(folder / "data")
    lessons = [lesson_of(pictures[n], processor) for n in range(len(pictures))]
    assert len(lessons) == 3 and all(x.image_tokens == (4,) for x in lessons)
    assert len({len(x.ids) for x in lessons}) == 1  # what is timed has one shape
    texts = open_train(folder / "texts")
    lengths = [len(lesson_of(texts[n], processor).ids) for n in range(len(texts))]
    assert len(set(lengths)) == 4 and max(lengths) < 1024


@pytest.mark.parametrize("more", [{}, {"accumulate": 2}, {"recompute": True}], ids=str)
def test_a_run_of_ours(folder, tmp_path, more):
    task = Task(
        model=str(folder / "ours"),
        data=str(folder / "data"),
        out=str(tmp_path / "out"),
        updates=2,
        evidence=True,
        **more,
    )
    side = measure(Task(**json.loads(json.dumps(asdict(task)))))
    assert len(side.seconds) == len(side.cpu) == len(side.losses) == 2
    assert min(side.seconds) > 0 and side.peak > side.loaded > 0
    assert side.process > side.peak
    # q, k, v, o and gate, up, down of two layers, rank 8
    assert side.trained == 2 * 8 * (4 * 64 + 3 * (32 + 48))
    assert len(side.ids) == 3 and len(set(map(len, side.ids))) == 1
    assert side.learned[0] < len(side.ids[0])
    assert abs(side.before - 6.4) < 0.3  # ln 600: nothing is known yet


def side(**values) -> Side:
    usual = {
        "seconds": [9.0, 2.0, 4.0],
        "cpu": [9.0, 1.0, 1.0],
        "losses": [3.0, 2.0, 1.0],
        "loaded": 50,
        "peak": 100,
        "process": 300,
        "trained": 7,
        "versions": {"mlx": "1"},
        "ids": [[1, 2], [1, 2, 3]],
        "learned": [1, 2],
        "before": 3.25,
    }
    return Side(**(usual | values))


def test_ratios_are_of_medians_without_the_first_update():
    ours = [side(), side(seconds=[0.1, 6.0, 4.0], peak=60)]
    rows = train._with_ratios(
        [
            train._row("mm1_mlx", "1", "mlx-vlm", ours),
            train._row("mlx-vlm", "1", "mlx-vlm", [side(seconds=[0, 8.0, 8.0])]),
        ]
    )
    assert [row.seconds for row in rows] == [4.0, 8.0]
    assert (rows[0].least, rows[0].most, rows[0].peak) == (2.0, 6.0, 80)
    assert [row.time_ratio for row in rows] == [0.5, 1.0]
    assert [row.peak_ratio for row in rows] == [0.8, 1.0]
    evidence = train._evidence(207_000_000, side(), side(before_causal=3.2))
    table = train.as_table(rows, evidence, 2)
    assert "LLaVA of 207M random parameters" in table
    assert "2 to 3 tokens, 1 to 2 of them learned: the same ids" in table
    assert "mm1_mlx 3.25000, mlx-vlm 3.25000" in table and "3.20000" in table
    assert "  0.50x" in table and "seconds <= 0.8x, peak GB <= 0.6x" in table
    other = train._evidence(1, side(), side(ids=[[1, 2], [1, 2, 4]]))
    assert "DIFFERENT ids" in train.as_table(rows, other, 2)
    values = train.as_object(rows, evidence, 2)
    assert values["goals"] == {"time_ratio": 0.8, "peak_ratio": 0.6}
    assert json.loads(json.dumps(values))["rows"][0]["time_ratio"] == 0.5


def test_a_run_that_fails_says_why(tmp_path):
    task = Task(model="m", data="d", out=str(tmp_path), updates=1)
    code = "import sys; sys.exit('no such thing')"
    with pytest.raises(MM1Error, match="mlx-vlm's run failed with code 1: no such th"):
        train._run("mlx-vlm", [sys.executable, "-c", code], task)


def test_what_the_command_refuses(tmp_path):
    peer = ("--against", "mlx-vlm")
    done = run_here("benchmark", "train", *peer)
    assert_fails(done, "--against mlx-vlm and --peer-python PATH belong tog", code=2)
    done = run_here("benchmark", "convert", *peer)
    assert_fails(done, "unknown flag '--against'", code=2)
    lacking = tmp_path / "python"
    done = run_here("benchmark", "train", *peer, "--peer-python", lacking)
    assert_fails(done, "cannot be run .No such file or directory.: give the Python")
    lacking.write_text("#!/bin/sh\nexit 1\n")
    lacking.chmod(0o755)
    done = run_here("benchmark", "train", *peer, "--peer-python", lacking)
    assert_fails(done, "has no mlx-vlm. In an environment of its own: pip install mlx")


def test_the_peers_side_reads_the_keys_of_a_task():
    """It has no Task of its own: another Python runs it."""
    import ast

    file = Path(train.__file__).with_name("peers") / "mlx_vlm_train.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    read = {
        node.slice.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript)
        and isinstance(node.value, ast.Name)
        and node.value.id == "task"
    }
    assert {"model", "data"} < read
    assert read < set(asdict(Task(model="", data="", out="", updates=1)))
