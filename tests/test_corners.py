"""The fine-tuning examples: their data, as the trainer reads it, and a short run."""

import json
import random
import shutil

import pytest

from examples import corners, labels, sentences
from examples.corners import CORNERS, sample
from examples.mm1_tiny.drawing import draw
from examples.mm1_tiny.replay import KINDS, old_question
from examples.mm1_tiny.scenes import HELD_OUT_PAIRS, sample_scene
from examples.teach import (
    TESTED,
    NewTask,
    read_lines,
    read_questions,
    shares,
    table,
    write_data,
    write_lines,
)
from helpers import assert_fails, need_tiny, run_here, run_python
from mm1_mlx.errors import DatasetError
from mm1_mlx.training.conversations import open_split


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_answer_is_that_of_the_thing_asked_for():
    rng, seen = random.Random(0), set()
    for _ in range(200):
        _, question, answer = sample(rng)
        assert question.startswith("How many corners does the ")
        seen.add(int(answer))
    assert seen == set(CORNERS.values())


def test_a_sentence_says_what_was_asked():
    rng = random.Random(0)
    for _ in range(50):
        _, question, answer = sentences.sample(rng)
        named = question.removesuffix("?").split()[-1 if "colour" in question else -2]
        assert question.startswith("In a sentence: what ")
        assert answer.endswith(".") and named in answer


@pytest.mark.parametrize("kind", KINDS)
def test_old_questions_leave_the_tests_of_mm1_tiny_alone(kind):
    """Pairs that a test asks about alone are never named."""
    rng = random.Random(kind)
    for _ in range(20):
        old = old_question(kind, rng)
        assert old.images and old.answer
        for colour, shape in HELD_OUT_PAIRS:
            assert f"{colour} {shape}" not in f"{old.prompt} {old.answer}"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corners")
    write_data(folder, corners.TASK, new=8, old=8, test=2, seed=0)
    return folder


def test_every_split_is_read_and_its_pictures_are_its_own(data):
    counts = {"train": 16, "valid": 4, "test": 2 + 2 * len(TESTED)}
    seen = set()
    for split, count in counts.items():
        samples = open_split(data, split)
        assert samples is not None
        found = lines_of(data / f"{split}.jsonl")
        if split != "test":
            assert len(samples) == count
            new = [line["task"] == "corners" for line in found]
            assert sum(new) == count // 2
            close = [line["task"].removeprefix("old ") for line in found]
            assert sum(task in corners.TASK.close for task in close) >= count // 4
        pictures = [(data / n).read_bytes() for line in found for n in line["images"]]
        assert samples[len(samples) - 1].images[0].is_file()
        assert not seen & set(pictures)
        seen |= set(pictures)


def test_the_table_says_what_was_lost():
    before = {"corners": 0.0, "count": 1.0, "shape": 0.9}
    after = {"corners": 0.995, "count": 0.96, "shape": 0.92}
    lines = table([("before", before), ("adapter", after)]).splitlines()
    assert lines[1].split() == ["corners", "0.0%", "99.5%"]
    assert lines[-1] == (
        "adapter: old tasks lose 1.0 points on average, count the most (4.0)"
    )


def test_shares_are_by_task(data):
    asked = read_questions(data / "test.jsonl")
    answers = [q.answer if q.groups["task"] == "corners" else "" for q in asked]
    found = shares(asked, answers)
    assert found.pop("corners") == 1.0 and set(found.values()) == {0.0}


# --- a folder of one's own -----------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    labels.draw_pictures(folder, 5, 0)
    (folder / "bar" / "notes.txt").write_text("no picture")
    return folder


def test_a_folder_of_pictures_becomes_data(pictures, data, tmp_path):
    place = tmp_path / "some" / "where"
    arguments = ["data", str(pictures), str(place), "--old", str(data)]
    assert labels.main([*arguments, "--question", "Which shape is this?"]) == 0
    used = {}
    for split, new, old in (("train", 18, 16), ("valid", 6, 4), ("test", 6, None)):
        samples = open_split(place, split)
        assert samples is not None
        own = [n for n in lines_of(place / f"{split}.jsonl") if n["task"] == "labels"]
        assert len(own) == new and (old is None or len(samples) == new + old)
        for line in own:
            assert line["question"] == "Which shape is this?"
            path = (place / line["images"][0]).resolve()
            assert path.parent.name == line["answer"] and path not in used
            used[path] = split
        assert all(samples[i].images[0].is_file() for i in range(len(samples)))
    assert len(used) == 5 * len(labels.NAMES)


def test_pictures_in_messages_move_too(tmp_path):
    part = {"type": "image", "image": "a.png"}
    line = {"messages": [{"role": "user", "content": [part]}], "images": ["b.png"]}
    found = labels.moved(line, tmp_path / "old", tmp_path / "new")
    assert found["messages"][0]["content"][0]["image"] == "../old/a.png"
    assert found["images"] == ["../old/b.png"] and part["image"] == "a.png"
    kinds = [{"image_url": {"url": "a.png"}}, {"image_url": "a.png"}]
    kinds += [{"image": {"path": "a.png"}}, {"image_url": "https://a.b/c.png"}]
    line = {"messages": [{"role": "user", "content": kinds}], "image": "data:x"}
    found = labels.moved(line, tmp_path / "old", tmp_path / "new")
    there = "../old/a.png"
    assert found["messages"][0]["content"] == [
        {"image_url": {"url": there}},
        {"image_url": there},
        {"image": {"path": there}},
        {"image_url": "https://a.b/c.png"},
    ]
    assert found["image"] == "data:x"


def test_a_text_with_other_line_ends_is_read_as_it_was_written(tmp_path):
    lines = [{"question": "a\u2028b\x85c", "answer": "d"}]
    write_lines(tmp_path / "a.jsonl", lines)
    assert read_lines(tmp_path / "a.jsonl") == lines


def test_what_is_no_folder_of_pictures(pictures, tmp_path):
    def command(*args):
        return run_here(*args, main=labels.main)

    data = tmp_path / "data"
    assert_fails(command("data", tmp_path / "x", data), "There is no folder .*LABEL")
    assert_fails(command("data", pictures / "bar", data), "has 0 folders with pictures")
    assert_fails(command("data", pictures), "needs two folders", code=2)
    assert_fails(command("draw", pictures), r"arrow is there already: name a new")
    data.mkdir()
    (data / "valid.jsonl").write_text("mine")
    assert_fails(command("data", pictures, data), r"valid\.jsonl is there already")
    assert (data / "valid.jsonl").read_text() == "mine"
    shutil.copytree(pictures, tmp_path / "few")
    for hidden in (".hidden", "tee/._000.png"):
        (tmp_path / "few" / hidden).mkdir()
        shutil.copy(pictures / "tee" / "000.png", tmp_path / "few" / hidden)
    found = labels.find_pictures(tmp_path / "few")
    assert len(found) == len(labels.NAMES) and len(found["tee"]) == 5
    for number in (0, 1, 2):
        (tmp_path / "few" / "tee" / f"{number:03}.png").unlink()
    with pytest.raises(DatasetError, match="'tee' has 2 pictures, but must have 3"):
        labels.divide(labels.find_pictures(tmp_path / "few"), random.Random(0))


def test_questions_that_cannot_be_asked(tmp_path):
    file = tmp_path / "test.jsonl"
    with pytest.raises(DatasetError, match=r"There is no .*test\.jsonl"):
        read_questions(file)
    file.write_text('{"question": "a", "answer": "b"}\n{"caption": "c"}\n')
    with pytest.raises(DatasetError, match=r"line 2: has the keys \['caption'\]"):
        read_questions(file)
    file.write_text("{")
    with pytest.raises(DatasetError, match="not a JSON object"):
        read_questions(file)


# --- all of it, in small -------------------------------------------------------------


def hue(rng):
    scene = sample_scene(rng, max_things=1)
    return draw(scene, rng), "Hue?", scene.things[0].colour


@pytest.mark.slow
def test_a_new_question_is_learned_on_four_bits_and_fused(tmp_path):
    """What it says about one thing it learns to say in one word, within eight steps."""
    need_tiny()
    folder, out = tmp_path / "data", tmp_path / "out"
    write_data(folder, NewTask("hue", hue), new=96, old=0, test=0, seed=0)
    (folder / "valid.jsonl").replace(folder / "test.jsonl")  # 24 questions
    recipe = ("--iters", "8", "--batch-size", "8", "--learning-rate", "3e-3")
    done = run_python(
        *("-m", "examples.teach", folder, out, "--quantized", "--"),
        *(*recipe, "--warmup", "2"),
        env={"MLX_DISABLE_COMPILE": "1"},  # by a C++ compiler: seconds for each shape
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    heads = next(line for line in lines if line.startswith("task ")).split("  ")
    assert [head.strip() for head in heads if head] == [
        "task", "before", "adapter", "fused8", "fused16",
    ]  # fmt: skip
    values = next(line for line in lines if line.startswith("hue ")).split()[1:]
    before, adapter, fused8, fused16 = (float(v.rstrip("%")) for v in values)
    assert before == 0 and adapter >= 70
    assert abs(fused8 - adapter) <= 100 / 24  # one answer: rounded, but finely
    assert fused16 == adapter
    assert "fused16: 24 of 24 answers are those of the adapter" in lines
    assert sum(line.startswith("$ python -m mm1_mlx.") for line in lines) == 4
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["mm1_mlx"]["base"] == str(out / "model")
    packed = json.loads((out / "fused8" / "config.json").read_text())["quantization"]
    bits = {how["bits"] for how in packed.values() if isinstance(how, dict)}
    assert packed["bits"] == 4 and 8 in bits
