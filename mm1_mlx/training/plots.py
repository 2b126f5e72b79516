"""Pictures of a run: its curves, and a few answers before and after it.

matplotlib (in the extra `train`) is imported where it is used, and without its global
state: figures are made and written directly, so that no window is ever opened.
"""

import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm1_mlx.checkpoint.folder import replacing_file
from mm1_mlx.errors import DatasetError
from mm1_mlx.inputs.images import load_image
from mm1_mlx.training.answers import (
    Example,
    is_right,
    question_of,
    read_examples,
)
from mm1_mlx.training.mixtures import Mixture
from mm1_mlx.training.samples import Samples

CURVES, ANSWERS = "curves.png", "answers.png"

_BLUE, _ORANGE, _GREEN, _RED, _GREY = (
    "#2563eb", "#ea7317", "#15803d", "#b91c1c", "#64748b",
)  # fmt: skip
# Families that hold what DejaVu Sans does not, on Macs and elsewhere.
_FONTS = (
    "PingFang SC", "Hiragino Sans GB", "Hiragino Sans", "Apple SD Gothic Neo",
    "Arial Unicode MS", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans",
    "Apple Color Emoji",
)  # fmt: skip


# --- Curves --------------------------------------------------------------------------


def read_metrics(file: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves of a metrics.jsonl: (step, value) of every name that is a number.

    Lines that are no JSON, as one left half-written, are passed over.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
            step = values.pop("step")
        except (ValueError, KeyError, AttributeError):
            continue
        if loads := values.get("expert_load"):
            values["most_loaded"] = max(max(layer) for layer in loads)
        for name, value in values.items():
            if isinstance(value, int | float) and math.isfinite(value):
                curves.setdefault(name, []).append((step, value))
    return curves


def smoothed(values: Sequence[float], window: float) -> list[float]:
    """An exponential mean over about `window` values, without a bias to the first."""
    keep, total, weight, found = 1 - 1 / max(window, 1.0), 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        found.append(total / weight)
    return found


def plot_curves(folder: Path, name: str = CURVES) -> Path:
    """Draw the curves of a run's metrics.jsonl into its folder; the picture's path."""
    from matplotlib.figure import Figure

    curves = read_metrics(folder / "metrics.jsonl")
    panels = [
        panel
        for panel in (_loss, _right, _rate, _norm, _experts)
        if panel(curves, None)
    ]
    if not panels:
        raise DatasetError(f"{folder / 'metrics.jsonl'} has no step to draw.")
    rows = 1 + len(panels) // 2
    figure = Figure(figsize=(11, 3.6 + 2.7 * (rows - 1)), dpi=110, layout="constrained")
    heights = [3.6] + [2.7] * (rows - 1)
    grid = figure.add_gridspec(rows, 2, height_ratios=heights)
    for place, panel in enumerate(panels):
        wide = place == 0 or (place == len(panels) - 1 and place % 2 == 1)
        row, column = (place + 1) // 2, (place + 1) % 2
        axes = figure.add_subplot(grid[row, :] if wide else grid[row, column])
        panel(curves, axes)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("step")
    figure.suptitle(folder.resolve().name, fontsize=11, color=_GREY)
    return _write(figure, folder / name)


def _line(axes: Any, points: list, name: str, colour: str, marks: bool = False) -> None:
    steps, values = zip(*points, strict=True)
    marker = "o" if marks or len(points) < 3 else None
    axes.plot(steps, values, color=colour, label=name, marker=marker, markersize=4)


def _noisy(axes: Any, points: list, name: str, colour: str) -> None:
    """A curve as it was measured, faint, and smoothed over a twentieth of it."""
    steps, values = zip(*points, strict=True)
    if len(points) < 20:
        _line(axes, points, name, colour)
        return
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(
        steps,
        smoothed(values, len(points) / 20),
        color=colour,
        label=f"{name}, smoothed",
    )


def _loss(curves: dict, axes: Any) -> bool:
    train, valid = curves.get("text") or curves.get("loss"), curves.get("valid")
    if axes is None or not train:
        return bool(train)
    _noisy(axes, train, "train", _BLUE)
    if valid:
        _line(axes, valid, "validation", _ORANGE, marks=True)
    axes.set_title("loss of the learned tokens")
    # The first steps of a run may be far above the rest, which they must not flatten.
    top = sorted(value for _, value in train)[int(0.99 * (len(train) - 1))]
    held = max([top, *(value for _, value in valid or ())])
    axes.set_ylim(bottom=0, top=1.08 * held or 1)
    axes.legend(frameon=False)
    return True


def _right(curves: dict, axes: Any) -> bool:
    tokens, task = curves.get("accuracy"), curves.get("task_accuracy")
    if axes is None or not (tokens or task):
        return bool(tokens or task)
    if tokens:
        _noisy(axes, tokens, "learned tokens, train", _BLUE)
    if task:
        asked = int(curves["task_samples"][-1][1])
        _line(axes, task, f"answers, {asked} held out", _GREEN, marks=True)
    axes.set_title("share that is right")
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.legend(frameon=False, loc="best")
    return True


def _rate(curves: dict, axes: Any) -> bool:
    if axes is not None:
        _line(axes, curves["rate"], "", _BLUE)
        axes.set_title("learning rate")
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    return bool(curves.get("rate"))


def _norm(curves: dict, axes: Any) -> bool:
    if axes is not None:
        _noisy(axes, curves["norm"], "norm", _BLUE)
        axes.set_title("norm of the gradients, before clipping")
        axes.set_ylim(bottom=0)
    return bool(curves.get("norm"))


def _experts(curves: dict, axes: Any) -> bool:
    if axes is not None:
        _line(axes, curves["most_loaded"], "", _BLUE)
        axes.set_title("most loaded expert of a layer: its share of tokens")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    return bool(curves.get("most_loaded"))


# --- Answers -------------------------------------------------------------------------

_CELL, _GAP, _MARGIN = 3.7, 0.4, 0.35  # inches: a column, and between and around them
_PICTURE, _LINE, _LABEL = 2.7, 0.19, 0.78  # a picture's height, a line, its label
_SIZE = 9.5  # points
_MOST = {"asked": 4, "expected": 3, "before": 5, "after": 5}  # lines of each text
_COLUMNS = 3


def plot_answers(
    folder: Path, samples: Samples | Mixture, name: str = ANSWERS
) -> Path | None:
    """Draw a run's answers.json with the pictures it is about; None if it has none.

    samples: those that the answers are to.
    """
    examples = read_examples(folder)
    if not examples:
        return None
    pictures = [_pictures(samples, example) for example in examples]
    return draw_answers(list(zip(examples, pictures, strict=True)), folder / name)


def draw_answers(cells: Sequence[tuple[Example, list[Any]]], path: Path) -> Path:
    """Draw questions with their pictures (PIL images) and answers into a file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(cells))
    measure = _Measure(FigureCanvasAgg(Figure(dpi=110)).get_renderer())
    blocks = [_block(example, measure) for example, _ in cells]
    rows = [
        range(i, min(i + columns, len(cells))) for i in range(0, len(cells), columns)
    ]
    heights = [
        _PICTURE + 0.12 + _LINE * max(len(blocks[i]) for i in row) + _GAP
        for row in rows
    ]
    width = 2 * _MARGIN + columns * _CELL + (columns - 1) * _GAP
    height = 2 * _MARGIN + sum(heights) - _GAP
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
    top = height - _MARGIN
    for row, taken in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            left = _MARGIN + column * (_CELL + _GAP)
            _draw_pictures(figure, cells[i][1], left, top, measure.fonts)
            _draw_block(figure, blocks[i], left, top - _PICTURE - 0.12, measure.fonts)
        top -= taken
    return _write(figure, path)


def _pictures(samples: Samples | Mixture, example: Example) -> list[Any]:
    question = question_of(samples[example.number])
    return [load_image(source) for source in question.images]


class _Measure:
    """Wraps texts by their width in inches, in the fonts that are there."""

    def __init__(self, renderer: Any):
        from matplotlib.font_manager import FontProperties, get_font_names

        there = set(get_font_names())
        self.fonts = ["DejaVu Sans", *(name for name in _FONTS if name in there)]
        self._renderer = renderer
        self._font = FontProperties(family=self.fonts, size=_SIZE)

    def width(self, text: str) -> float:
        """Of a line, in inches."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a letter that no font has
            found = self._renderer.get_text_width_height_descent(
                text, self._font, False
            )
        return found[0] / self._renderer.dpi

    def wrap(self, text: str, room: float, most: int) -> list[str]:
        """Lines of at most `room` inches; what is over `most` lines ends with '…'."""
        lines, line = [], ""
        for word in _words(" ".join(text.split())):
            if len(lines) > most:
                break
            if self.width((line + word).rstrip()) <= room:
                line += word
                continue
            # One that no line has room for, as a text without spaces, is cut anywhere.
            for part in word if self.width(word.rstrip()) > room else [word]:
                if line and self.width((line + part).rstrip()) > room:
                    lines.append(line.rstrip())
                    line = ""
                line += part
                if len(lines) > most:
                    break
        lines.append(line.rstrip())
        lines = [line for line in lines if line]
        if len(lines) <= most:
            return lines
        last = lines[most - 1]
        while last and self.width(last + "…") > room:
            last = last[:-1]
        return [*lines[: most - 1], last.rstrip() + "…"]


def _words(text: str) -> list[str]:
    """Words with the space after them."""
    words = text.split(" ")
    return [word + " " for word in words[:-1]] + words[-1:]


Line = tuple[str, str, str, str]  # a label, its colour, the text behind it, its colour


def _block(example: Example, measure: _Measure) -> list[Line]:
    """The lines of text below a picture."""
    lines = [
        ("", "", t, "black")
        for t in measure.wrap(
            example.question or "(no question)", _CELL, _MOST["asked"]
        )
    ]
    answers = [
        ("expected", example.expected, "black"),
        ("before", example.before, None),
    ]
    if example.after is not None:
        answers.append(("after", example.after, None))
    for label, text, colour in answers:
        mark = ""
        if colour is None:
            right = is_right(text, example.expected)
            mark, colour = ("✓ ", _GREEN) if right else ("✗ ", _RED)
        room = _CELL - _LABEL
        wrapped = measure.wrap(mark + (text or "(nothing)"), room, _MOST[label])
        lines += [
            (label if i == 0 else "", _GREY, t, colour) for i, t in enumerate(wrapped)
        ]
    return lines


def _draw_block(
    figure: Any, lines: list[Line], left: float, top: float, fonts: list[str]
) -> None:
    width, height = figure.get_size_inches()
    labelled = False
    for number, (label, label_colour, text, colour) in enumerate(lines):
        labelled = labelled or bool(label)
        y = (top - number * _LINE) / height
        settings = {
            "fontsize": _SIZE,
            "family": fonts,
            "va": "top",
            "parse_math": False,
        }
        if label:
            figure.text(left / width, y, label, color=label_colour, **settings)
        start = left + (_LABEL if labelled else 0.0)
        figure.text(start / width, y, text, color=colour, **settings)


def _draw_pictures(
    figure: Any, pictures: list[Any], left: float, top: float, fonts: list[str]
) -> None:
    """The first pictures of a question side by side, or a field where it has none."""
    width, height = figure.get_size_inches()
    shown = pictures[:2]
    if not shown:
        box = [
            left / width,
            (top - _PICTURE) / height,
            _CELL / width,
            _PICTURE / height,
        ]
        axes = figure.add_axes(box, facecolor="#f1f5f9")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.text(
            0.5,
            0.5,
            "text only",
            ha="center",
            va="center",
            color=_GREY,
            fontsize=_SIZE,
            family=fonts,
        )
        return
    room = (_CELL - 0.1 * (len(shown) - 1)) / len(shown)
    for place, picture in enumerate(shown):
        start = left + place * (room + 0.1)
        box = [
            start / width,
            (top - _PICTURE) / height,
            room / width,
            _PICTURE / height,
        ]
        axes = figure.add_axes(box)
        picture = picture.copy()
        picture.thumbnail((800, 800))
        axes.imshow(
            picture, interpolation="nearest" if max(picture.size) < 200 else None
        )
        axes.set_anchor("SW")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color("#cbd5e1")
    if more := len(pictures) - len(shown):
        axes.text(
            0.98,
            0.02,
            f"+{more} more",
            transform=axes.transAxes,
            ha="right",
            va="bottom",
            fontsize=_SIZE,
            color="white",
            bbox={"facecolor": "black", "alpha": 0.6, "pad": 2, "linewidth": 0},
        )


def _write(figure: Any, path: Path) -> Path:
    """The picture, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    with warnings.catch_warnings(), replacing_file(path) as temporary:
        warnings.simplefilter("ignore")  # a letter that no font has
        figure.savefig(temporary, format="png")
    return path
