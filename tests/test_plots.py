"""Pictures of a run: what is drawn, where, and that texts fit."""

import json

import pytest
from PIL import Image

from helpers import assert_close, need
from mm1_mlx.errors import DatasetError
from mm1_mlx.training.answers import Example, write_examples
from mm1_mlx.training.json_samples import JsonLines

need("matplotlib")

from mm1_mlx.training import plots  # noqa: E402

LONG = "The quick brown fox jumps over the lazy dog, which costs $5 or $6_7$. " * 9


def log(folder, lines) -> None:
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 99, "te')  # half-written


def steps(count: int, **more) -> list[dict]:
    return [
        {"step": n, "text": 4 / n, "accuracy": 0.5, "rate": 1e-4, "norm": 2.0, **more}
        for n in range(1, count + 1)
    ]


@pytest.fixture
def figures(monkeypatch):
    """The figures that are written."""
    found = []
    write = plots._write
    monkeypatch.setattr(plots, "_write", lambda f, p: found.append(f) or write(f, p))
    return found


def test_curves_of_a_log(tmp_path):
    log(
        tmp_path,
        [{"step": 0, "task_accuracy": 0.1}, *steps(3, expert_load=[[0.2, 0.8]])],
    )
    found = plots.read_metrics(tmp_path / "metrics.jsonl")
    assert found["task_accuracy"] == [(0, 0.1)]
    assert found["text"] == [(1, 4.0), (2, 2.0), (3, 4 / 3)]
    assert found["most_loaded"] == [(1, 0.8), (2, 0.8), (3, 0.8)]


def test_smoothing_by_hand():
    """A window of 2 keeps half: (2 * 0.5 + 4) / 1.5 = 10 / 3; none keeps nothing."""
    assert_close(plots.smoothed([2.0, 4.0], 2), [2.0, 10 / 3], atol=1e-12)
    assert plots.smoothed([2.0, 4.0, 3.0], 0.1) == [2.0, 4.0, 3.0]
    assert_close(plots.smoothed([3.0] * 5, 4), [3.0] * 5, atol=1e-12)


@pytest.mark.parametrize("count", [1, 2, 60])
def test_what_is_drawn_of_a_run(tmp_path, figures, count):
    lines = steps(count, expert_load=[[0.2, 0.8]])
    lines[-1] |= {"valid": 1.0, "task_accuracy": 1.0, "task_samples": 8}
    log(tmp_path / "run", lines)
    path = plots.plot_curves(tmp_path / "run")
    assert path.name == "curves.png" and Image.open(path).format == "PNG"
    titles = [axes.get_title() for axes in figures[0].axes]
    assert [title.split()[0] for title in titles] == [
        *("loss", "share", "learning", "norm", "most"),
    ]
    labels = [text.get_text() for text in figures[0].axes[0].get_legend().texts]
    assert labels == ["train, smoothed" if count == 60 else "train", "validation"]
    assert not list((tmp_path / "run").glob(".*partial*"))


def test_an_encoder_stage_has_fewer_curves(tmp_path, figures):
    log(tmp_path, [{"step": n, "loss": 1.0, "rate": 0.1, "norm": 1.0} for n in (1, 2)])
    plots.plot_curves(tmp_path)
    assert len(figures[0].axes) == 3
    log(tmp_path, [])
    with pytest.raises(DatasetError, match="has no step to draw"):
        plots.plot_curves(tmp_path)


def cells() -> list:
    def image(w, h):
        return Image.new("RGB", (w, h), "teal")

    return [
        (Example(0, "What is this?", "A cat.", "a dog", "a cat"), [image(640, 480)]),
        (Example(1, LONG, LONG, LONG, LONG), [image(30, 900)]),
        (Example(2, "", "3", "", "four"), [image(96, 96), image(9, 9), image(9, 9)]),
        (Example(3, "x" * 900, "猫です" * 90, "$\\frac$ _^", "<b>"), []),
        (Example(4, "Before only", "yes", "no"), [image(2000, 20)]),
    ]


@pytest.mark.filterwarnings("ignore:Glyph")  # not every machine has every script
@pytest.mark.parametrize("count", [1, 2, 5])
def test_nothing_overlaps_or_leaves_the_picture(tmp_path, figures, count):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path = plots.draw_answers(cells()[:count], tmp_path / "answers.png")
    figure = figures[0]
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in figure.texts]
    boxes += [axes.get_window_extent(renderer) for axes in figure.axes]
    width, height = Image.open(path).size
    for number, box in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
        for other in boxes[number + 1 :]:
            # Lines of text may touch: their boxes have room for accents.
            w = min(box.x1, other.x1) - max(box.x0, other.x0)
            h = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert w < 1 or h < 3, (box, other)


def test_what_stands_below_a_picture(tmp_path, figures):
    plots.draw_answers(cells(), tmp_path / "answers.png")
    shown = [text.get_text() for text in figures[0].texts]
    first = shown[: shown.index("after") + 2]
    assert first == [
        *("What is this?", "expected", "A cat.", "before", "✗ a dog"),
        *("after", "✓ a cat"),
    ]
    assert "✗ (nothing)" in shown and "(no question)" in shown
    cut = [text for text in shown if text.endswith("…")]
    assert len(cut) == 6  # four of LONG, the x's and the cats
    assert shown.count("after") == 4
    inside = [t.get_text() for axes in figures[0].axes for t in axes.texts]
    assert inside == ["+1 more", "text only"]


def test_texts_are_cut_into_lines_that_fit():
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measure = plots._Measure(FigureCanvasAgg(Figure(dpi=110)).get_renderer())
    for text in (LONG, "x" * 200, "a " + "y" * 60 + " b", "one two"):
        lines = measure.wrap(text, 1.5, 99)
        assert all(measure.width(line) <= 1.5 for line in lines)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
        few = measure.wrap(text, 1.5, 2)
        assert len(few) <= 2 and (few[-1][-1] == "…") is (len(lines) > 2)
        assert all(measure.width(line) <= 1.5 for line in few)
    assert measure.wrap("one two", 9.0, 1) == ["one two"]


def test_answers_of_a_folder(tmp_path, figures):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    lines = [
        {"question": "What?", "answer": "red", "image": "a.png"},
        {"question": "Why?", "answer": "so"},
    ]
    file = tmp_path / "valid.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert plots.plot_answers(tmp_path, JsonLines(file)) is None
    write_examples(tmp_path, [Example(1, "Why?", "so", "no", "so")] * 2)
    path = plots.plot_answers(tmp_path, JsonLines(file))
    assert path == tmp_path / "answers.png" and len(figures[0].axes) == 2
