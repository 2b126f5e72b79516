"""Boxes on the command line: --box, --point, --box-format, --draw and --json."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from helpers import ROOT, TINY, assert_fails, need_tiny, run_cli, run_here
from mm1_mlx.inference import generation

SHAPES = ROOT / "examples" / "shapes.png"


@pytest.fixture
def says(monkeypatch):
    """Have the command's model answer with a given text; what it was asked."""
    need_tiny()
    asked = {}

    def make(text: str) -> dict:
        def stream(model, processor, prompt, images, **settings):
            asked.update(prompt=prompt, images=images)
            yield generation.GenerationResponse(
                text=text,
                token_id=2,
                token_ids=(2,),
                prompt_tokens=9,
                prompt_tps=1.0,
                generation_tokens=1,
                generation_tps=float("nan"),
                ttft=0.1,
                num_images=len(images),
                image_tokens=len(images),
                image_seconds=0.0,
                image_sizes=((8, 8),),
                peak_memory=0.1,
                finish_reason="stop",
            )

        monkeypatch.setattr(generation, "stream_generate", stream)
        return asked

    return make


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """The command in this process, with a model that does not say how it writes boxes:
    its exit code."""
    from mm1_mlx.generate import main

    need_tiny()
    folder = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("box_config", None)
    (folder / "config.json").write_text(json.dumps(config))
    return lambda *args: main(["--model", str(folder), *map(str, args)])


def differs(path, original) -> np.ndarray:
    """Where a drawn picture is not the original. (H, W) bool."""
    drawn = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return np.abs(drawn - np.asarray(original)).max(-1) > 60


def test_an_answers_box_is_drawn_where_it_is(ask, says, tmp_path, capsys):
    says("There is a thing at [250, 500, 750, 900].")
    image = Image.new("RGB", (400, 200), "gray")
    image.save(tmp_path / "a.png")
    out = tmp_path / "out.png"
    code = ask(
        "-p", "Where?", "--image", tmp_path / "a.png", "--draw", out,
        "--box-format", "ferret",
    )  # fmt: skip
    assert code == 0
    printed = capsys.readouterr()
    assert printed.out == "There is a thing at [250, 500, 750, 900].\n"
    assert f"drawn: 1 on {out}\n" in printed.err
    assert Image.open(out).size == (400, 200)
    rows, columns = np.nonzero(differs(out, image)[100:])  # the label is above
    assert (columns.min(), columns.max() + 1) == (99, 301)
    assert rows.max() + 1 == 81
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "out.png"]


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".PNG"])
def test_the_ending_is_the_format(ask, says, tmp_path, suffix):
    says("<1,1,500,500>")
    out = tmp_path / f"out{suffix}"
    assert ask("-p", "Where?", "--image", SHAPES, "--draw", out, "--quiet") == 0
    format = Image.open(out).format
    assert format == {".jpg": "JPEG", ".webp": "WEBP", ".PNG": "PNG"}[suffix]


def test_of_several_pictures_those_with_boxes_are_drawn(ask, says, tmp_path, capsys):
    says("In image 1 a star <100,100,500,500>, in image 3 a circle <1,1,90,90>")
    out = tmp_path / "out.png"
    pictures = [SHAPES] * 3
    assert ask("-p", "Where?", "--image", *pictures, "--draw", out) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out-1.png", "out-3.png"]
    assert "out-3.png (a guess: the model's folder does not say" in (
        capsys.readouterr().err
    )


def test_boxes_are_in_the_object_in_pixels(ask, says, tmp_path, capsys):
    says("a star <500,500,1000,1000>, here: <0,0>")
    Image.new("RGB", (400, 200)).save(tmp_path / "a.png")
    ask(
        "-p", "Where?", "--image", tmp_path / "a.png", "--json", "--quiet",
        "--box-format", "mm1",
    )  # fmt: skip
    box, point = json.loads(capsys.readouterr().out)["boxes"]
    assert box == {
        "label": "a star",
        "kind": "box",
        "pixels": [200.2, 100.1, 400, 200],
        "image": 1,
        "span": [7, 26],
        "guessed": False,
    }
    assert (point["kind"], point["pixels"]) == ("point", [0.2, 0.1])


def test_pixels_come_into_the_prompt_as_the_model_writes_them(ask, says, tmp_path):
    asked = says("red")
    Image.new("RGB", (400, 200)).save(tmp_path / "a.png")
    code = ask(
        "-p", "What is in <box> and at <point>?", "--image", tmp_path / "a.png",
        "--box", "100,50,200,100", "--point", "100,50", "--box-format", "llava",
    )  # fmt: skip
    assert code == 0
    # LLaVA's square has borders of 100 above and below.
    assert asked["prompt"] == (
        "What is in [0.25, 0.38, 0.50, 0.50] and at [0.25, 0.38]?"
    )


def test_a_plan_counts_the_numbers(tmp_path):
    need_tiny()
    ask = ("generate", "--image", SHAPES, "--plan", "--json", "--box-format", "mm1")
    short = run_here(*ask, "-p", "What is in it?")
    boxed = run_here(*ask, "-p", "What is in <box>?", "--box", "1,2,30,40")
    prompts = [json.loads(d.stdout)["plan"]["work"]["prompt"] for d in (short, boxed)]
    assert prompts[1] > prompts[0]


def test_an_answer_without_boxes_is_said_and_no_error(tmp_path):
    need_tiny()
    out = tmp_path / "out.png"
    question = ("-p", "What colour is the star?", "--image", SHAPES)
    done = run_cli("generate", *question, "--draw", out)
    assert (done.returncode, done.stdout) == (0, "yellow\n")
    assert "note: the answer has no boxes or points, so nothing was drawn" in (
        done.stderr
    )
    assert not out.exists()


USAGE = [
    ("--draw out.gif", r"--draw out\.gif must end with \.png, \.jpg"),
    ("--draw absent/out.png", r"the folder absent is not there"),
    ("--draw {image}", r"--draw would write over the picture"),
    ("--box 1,2,3", r"--box: must be x1,y1,x2,y2 in pixels of the picture, not '1,2,3"),
    ("--box 1,2,3,nan", r"must be x1,y1,x2,y2 in pixels"),
    ("--box -1,2,3", r"--box: must be x1,y1,x2,y2 in pixels .* not '-1,2,3'"),
    ("--box -1,2,3,4x", r"unknown flag '-1,2,3,4x'"),
    ("--point 1", r"--point: must be x,y in pixels of the picture, not '1'"),
    ("--box-format feret", r"unknown value 'feret'; did you mean 'ferret'\?"),
]


@pytest.mark.parametrize("flags, pattern", USAGE, ids=[flags for flags, _ in USAGE])
def test_wrong_flags_are_refused_before_anything_is_read(flags, pattern, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    words = [word.format(image=tmp_path / "a.png") for word in flags.split()]
    question = ("-p", "hi", "--image", tmp_path / "a.png")
    done = run_here("generate", *question, *words)
    assert_fails(done, pattern, code=2)


def test_a_pattern_or_a_film_does_not_hide_what_would_be_written_over(
    ask, tmp_path, capsys
):
    """Names are those of the real pictures: o-2.png is one of them."""
    need_tiny()
    for name in ("o-1.png", "o-2.png"):
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    before = (tmp_path / "o-2.png").read_bytes()
    draw = ("--draw", tmp_path / "o.png")
    assert ask("-p", "hi", "--image", f"{tmp_path}/*.png", *draw) == 2
    assert "would write over the picture" in capsys.readouterr().err
    video = ("--video", tmp_path, "--image", SHAPES)
    assert ask("-p", "hi", *video, *draw) == 2
    assert "would write over the picture" in capsys.readouterr().err
    assert (tmp_path / "o-2.png").read_bytes() == before


def test_a_box_that_is_cut_is_said(ask, says, tmp_path, capsys):
    asked = says("yes")
    Image.new("RGB", (100, 100)).save(tmp_path / "a.png")
    form = ("--image", tmp_path / "a.png", "--box-format", "mm1", "-p", "Is <box>?")
    assert ask(*form, "--box", "50,-5,120,60") == 0
    message = "The box 50,-5,120,60 is cut to 50,0,100,60: the picture is 100x100."
    assert message in capsys.readouterr().err
    assert asked["prompt"] == "Is <500,0,999,600>?"
    for flag in (("--box", "-50,-.5,50,60"), ("--box=-50,-.5,50,60",)):
        assert ask(*form, *flag) == 0
        cut = "The box -50,-0.5,50,60 is cut to 0,0,50,60"
        assert cut in capsys.readouterr().err
        assert asked["prompt"] == "Is <0,0,500,600>?"
    assert ask(*form, "--box", "100,60,50,0") == 0
    assert "is cut" not in capsys.readouterr().err


def test_a_place_that_nothing_fills_is_said(ask, says, capsys):
    asked = says("yes")
    question = ("-p", "Is <box> at <point>?", "--image", SHAPES)
    assert ask(*question) == 0
    told = capsys.readouterr().err
    assert "note: <box> in the prompt is read as text: --box fills it\n" in told
    assert "note: <point> in the prompt is read as text: --point fills it\n" in told
    assert asked["prompt"] == "Is <box> at <point>?"
    form = ("--box-format", "qwen")
    assert ask(*question, *form, "--box", "1,1,50,50") == 0
    told = capsys.readouterr().err
    assert "<point> in the prompt is read as text" in told and "<box> in" not in told
    assert ask(*question, "--quiet") == 0
    assert capsys.readouterr().err == ""


def test_nothing_to_draw_on():
    done = run_here("generate", "-p", "hi", "--draw", "out.png")
    assert_fails(done, r"--draw goes with --image", code=2)


WRONG = [
    (("-p", "hi", "--box", "1,2,30,40"), r"1 box came .* it has 0 <box>"),
    (("-p", "<box>?", "--box", "9000,0,9100,5"), r"lies outside of the picture of"),
    (("-p", "<box>?", "--box", "5,5,5,50"), r"has no area"),
    (("-p", "<box>?", "--box", "-9,-9,-5,-5"), r"box -9,-9,-5,-5 lies outside of the"),
    (("-p", "<point>?", "--point", "-5,3"), r"point -5,3 lies outside of the picture"),
    (("-p", "<point>?", "--point=-5,3"), r"point -5,3 lies outside of the picture"),
]


@pytest.mark.parametrize("args, pattern", WRONG, ids=[p for _, p in WRONG])
def test_wrong_boxes_are_one_line(args, pattern):
    need_tiny()
    form = ("--box-format", "mm1")
    done = run_here("generate", "--image", SHAPES, *args, *form)
    assert_fails(done, pattern)
    assert done.stderr.count("\n") == 1


def test_a_picture_that_cannot_be_written_is_one_line(ask, says, tmp_path, capsys):
    says("<1,1,500,500>")
    place = tmp_path / "out.png"
    place.mkdir()
    assert ask("-p", "Where?", "--image", SHAPES, "--draw", place) == 1
    assert "error: " in capsys.readouterr().err.splitlines()[-1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.png"]
