"""examples/classify.py and examples/search.py, as printed there; wrong inputs too."""

import csv
import re
import shutil

import pytest
from PIL import Image

from examples import classify, search
from helpers import assert_fails, need_tiny, run_python
from mm1_mlx import FewShot
from mm1_mlx.errors import DatasetError


@pytest.mark.parametrize("example", [classify, search])
def test_the_lines_of_its_help_run(example, tmp_path, monkeypatch, capsys):
    """As printed, one after the other."""
    need_tiny()
    monkeypatch.chdir(tmp_path)
    text = example.parser().format_help().replace("\\\n", " ")
    lines = [x.split() for x in text.splitlines() if x.startswith("    python -m")]
    assert len(lines) == 2
    for line in lines:
        assert line[:3] == ["python", "-m", example.__name__]
        assert example.main(line[3:]) == 0
    assert capsys.readouterr().out
    assert {"classify": "out", "search": "found.png"}[
        example.__name__.removeprefix("examples.")
    ] in {path.name for path in tmp_path.iterdir()}


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classify") / "pictures"
    assert classify.main([str(folder), "--draw", "--count", "5"]) == 0
    return folder


def test_pictures_are_sorted_by_what_their_examples_show(classes, tmp_path, capsys):
    need_tiny()
    out = tmp_path / "out"
    flags = ["--shots", "3", "--examples", "3", "--max-tokens", "4"]
    for more in ([], ["--choice", "nearest", "--question", "What is it?"]):
        capsys.readouterr()
        code = classify.main([str(classes), str(out), *flags, *more])
        assert code == 0
        printed = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in printed[1:5]] == [
            "dax",
            "tib",
            "wug",
            "all",
        ]
        assert re.search(r"of 6 +\d+% to \d+% +\d+%$", printed[4])
        with (out / "answers.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 6
        for row in rows:
            said = row["answer"].strip().rstrip(".").lower()
            assert (said == row["class"]) == int(row["right"])
        right = sum(int(row["right"]) for row in rows)
        assert f" {right} of 6 " in printed[4]
    shots = FewShot(out / "shots.jsonl").examples
    assert sorted({shot.answer for shot in shots}) == ["dax", "tib", "wug"]
    shown = {shot.images[0].resolve() for shot in shots}
    assert len(shown) == 9 and not shown & {(classes / r["picture"]) for r in rows}
    assert shots[0].prompt == "What is it?"


def test_no_picture_is_both_shown_and_asked_about():
    import random
    from pathlib import Path

    pictures = {k: [Path(f"{k}{i}") for i in range(9)] for k in ("a", "b")}
    shown, asked = classify.divide(pictures, 4, random.Random(0))
    assert len(shown) == 8 and len(asked) == 10
    assert not {p for p, _ in shown} & {p for p, _ in asked}
    assert all(path.name[0] == label for path, label in [*shown, *asked])
    with pytest.raises(
        DatasetError, match=r"'a' has 9 pictures that can be read, .* --examples 8\."
    ):
        classify.divide(pictures, 9, random.Random(0))


def test_a_broken_picture_ends_no_sorting(classes, tmp_path, capsys):
    need_tiny()
    folder = tmp_path / "pictures"
    shutil.copytree(classes, folder)
    for label in ("dax", "wug"):
        (folder / label / "broken.png").write_bytes(b"no picture")
    flags = ["--shots", "3", "--examples", "4", "--max-tokens", "2"]
    assert classify.main([str(folder), str(tmp_path / "out"), *flags]) == 1
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert [line[:9] for line in lines[:2]] == ["skipped: "] * 2
    assert "dax/broken.png is not an image" in lines[0] and "wug/" in lines[1]
    assert " of 3 " in printed.out.splitlines()[4]
    for file in (folder / "tib").glob("*.png"):
        file.write_bytes(b"no picture")
    assert classify.main([str(folder), str(tmp_path / "new"), *flags]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: 'tib' has 0 pictures") and "--examples" not in last
    assert not (tmp_path / "new").exists()


def test_answers_are_compared_without_capitals_and_a_full_stop(tmp_path):
    said = ["Red cat.", "red cat", " RED  CAT. ", "red cats", ""]
    outcomes = [classify.Outcome("1.png", "red cat", text, "red cat") for text in said]
    outcomes.append(classify.Outcome("2.png", "Dog", "dog", "Dog"))
    assert [o.right for o in outcomes] == [True] * 3 + [False] * 2 + [True]
    lines = classify.table(outcomes).splitlines()
    assert " 4 of 6 " in lines[-2] and lines[-1] == "2 of 6 answers name no class"
    classify.write_answers(tmp_path / "answers.csv", outcomes)
    with (tmp_path / "answers.csv").open(encoding="utf-8", newline="") as file:
        assert [row["right"] for row in csv.DictReader(file)] == list("111001")


def test_the_table():
    outcomes = [
        classify.Outcome("1.png", "cat", "cat", "dog"),
        classify.Outcome("2.png", "cat", "cow", "cat"),
        classify.Outcome("3.png", "dog", "dog", "dog"),
    ]
    lines = [re.split(r"  +", line) for line in classify.table(outcomes).splitlines()]
    assert [(line[0], line[1], line[-1]) for line in lines[1:4]] == [
        ("cat", "1 of 2", "50%"),
        ("dog", "1 of 1", "100%"),
        ("all", "2 of 3", "67%"),
    ]
    assert lines[4] == ["1 of 3 answers name no class"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search") / "pictures"
    assert search.main([str(folder), "--draw", "--count", "12"]) == 0
    return folder


def test_the_nearest_pictures(pictures, tmp_path, capsys):
    need_tiny()
    copy = pictures / "deep" / "copy.png"
    copy.parent.mkdir(exist_ok=True)
    query = sorted(pictures.glob("*.png"))[0]
    shutil.copy(query, copy)
    Image.new("RGB", (9, 9)).save(pictures / ".hidden.png")
    flags = ["--query", str(query), "--top", "7", "--index", str(tmp_path / "i.bin")]
    flags += ["--sheet", str(tmp_path / "new" / "a.png")]
    printed = []
    for _ in "12":  # the second time by the index
        capsys.readouterr()
        assert search.main([str(pictures), *flags]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    lines = printed[0].splitlines()
    assert lines[0] == f"1.0000 {copy}" and len(lines) == 7
    values = [float(line.split()[0]) for line in lines]
    assert values == sorted(values, reverse=True) and values[-1] < 1
    assert not any(str(query) == line.split()[1] for line in lines)
    with Image.open(tmp_path / "new" / "a.png") as sheet:
        assert sheet.size == (8 + 5 * 168, 8 + 2 * 182)  # the query and seven: two rows
        assert sheet.getpixel((5, 5)) == (255, 0, 0)


def test_a_broken_picture_ends_no_search(pictures, tmp_path, capsys):
    need_tiny()
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    (folder / "broken.png").write_bytes(b"no picture")
    query = sorted(folder.glob("*_*.png"))[0]
    flags = ["--query", str(query), "--top", "99", "--index", str(tmp_path / "i.bin")]
    assert search.main([str(folder), *flags]) == 1
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("skipped: ") and "broken.png is not an image" in line
    names = {found.split(" ", 1)[1] for found in printed.out.splitlines()}
    assert names == {str(path) for path in find(folder)} - {str(query)}
    (folder / "broken.png").unlink()
    assert search.main([str(folder), *flags]) == 0


def test_an_index_that_is_another_file_is_not_written_over(pictures, tmp_path, capsys):
    need_tiny()
    index = tmp_path / "notes.txt"
    index.write_text("mine")
    query = sorted(pictures.glob("*.png"))[0]
    flags = ["--query", str(query), "--index", str(index)]
    assert search.main([str(pictures), *flags]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("is no file of image features. Name another file.")
    assert "Delete" not in line and index.read_text() == "mine"


def test_a_sheet_writes_over_nothing_but_a_sheet(pictures, tmp_path, capsys):
    """And is none of the pictures that are searched."""
    need_tiny()
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    query = sorted(folder.glob("*_*.png"))[0]
    before = query.read_bytes()
    flags = [str(folder), "--query", str(query), "--top", "3", "--sheet"]
    assert search.main([*flags, str(query)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "is there already, and no sheet of this command" in line
    assert query.read_bytes() == before
    found = []
    for _ in "12":
        assert search.main([*flags, str(folder / "found.png")]) == 0
        found.append(capsys.readouterr().out)
    assert found[0] == found[1] and "found.png" not in found[0]


def test_only_what_a_sorting_wrote_is_written_over(classes, tmp_path, capsys):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "shots.jsonl").write_text("{}\n")
    assert classify.main([str(classes), str(mine)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "shots.jsonl is there already, and was not written by this" in line
    assert (mine / "shots.jsonl").read_text() == "{}\n"
    assert classify.main([str(classes), str(mine / "shots.jsonl")]) == 1
    assert "is a file, but OUT is a folder" in capsys.readouterr().err
    assert [path.name for path in mine.iterdir()] == ["shots.jsonl"]


def test_a_sorting_that_fails_keeps_the_answers_of_before(classes, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    classify.write_answers(out / "answers.csv", [])
    with (out / "answers.csv").open("a") as file:
        file.write("a.png,b,c,0,d\n")
    before = (out / "answers.csv").read_bytes()
    assert classify.main([str(classes), str(out), "--model", "mm1-tyny"]) == 1
    assert (out / "answers.csv").read_bytes() == before


def find(folder):
    """Its pictures that can be read."""
    return [path for path in folder.rglob("[!.]*.png") if path.name != "broken.png"]


def command(*args):
    return run_python("-m", *args)


@pytest.mark.parametrize(
    "args, message, code",
    [
        (("examples.classify", "{}"), r"two folders are needed: PICTURES and OUT", 2),
        (("examples.classify", "{}/x", "{}/out"), r"There is no folder .*x: expect", 1),
        (("examples.classify", "{}", "--draw"), r"is there already: name a new", 1),
        (("examples.classify", "{}", "o", "--shots", "0"), r"whole number of 1 or", 2),
        (("examples.search", "{}"), r"are required: --query", 2),
        (("examples.search", "{}/x", "--query", "a.png"), r"There is no folder .*x", 1),
        (("examples.search", "{}", "--query", "a.png"), r"has no pictures", 1),
        (("examples.search", "{}", "--draw"), r"is there already: name a new", 1),
        (("examples.search", "{}", "--query", "a", "--sheet", "b.gif"), r"\.png", 2),
    ],
)  # fmt: skip
def test_wrong_inputs_are_one_line(tmp_path, args, message, code):
    done = command(*(arg.replace("{}", str(tmp_path)) for arg in args))
    assert_fails(done, message, code=code)


def test_a_query_that_is_no_picture(pictures):
    need_tiny()
    done = command("examples.search", pictures, "--query", pictures / "absent.png")
    assert_fails(done, r"No image file .*absent\.png")


@pytest.mark.parametrize("name", ["classify", "search"])
def test_help(name):
    done = command(f"examples.{name}", "--help")
    assert done.returncode == 0 and f"usage: python -m examples.{name}" in done.stdout
