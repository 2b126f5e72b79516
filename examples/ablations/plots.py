"""A picture for each table, and one for each axis of a table that has several."""

import math
from pathlib import Path
from typing import Any

from examples.ablations.findings import Results, mean_interval
from examples.ablations.measure import MEASURES, share
from examples.ablations.plan import Cell, Table, value_of

_COLOURS = ("#2563eb", "#ea7317", "#15803d", "#64748b")
_UNITS = {"tokens": " tokens", "pixels": " px"}


def plot_table(folder: Path, table: Table, results: Results) -> Path:
    """TABLE.png: every cell's measures with intervals and single seeds; its path."""
    from matplotlib.figure import Figure

    cells = [c for c in table.cells if any(c == known for known, _ in results)]
    figure = Figure(figsize=(9, 0.9 + 0.42 * len(cells)), dpi=120)
    panels = figure.subplots(1, len(MEASURES), sharey=True, squeeze=False)[0]
    for panel, (measure, name), colour in zip(
        panels, MEASURES.items(), _COLOURS, strict=True
    ):
        for row, cell in enumerate(cells):
            own = [r for (c, _), r in results.items() if c == cell]
            _draw_row(panel, row, [share(r, measure) for r in own], colour)
        panel.set_title(name, fontsize=9)
        panel.tick_params(labelsize=8)
        panel.grid(axis="x", alpha=0.3)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    panels[0].set_yticks(range(len(cells)), [_label(table, cell) for cell in cells])
    panels[0].set_ylim(len(cells) - 0.5, -0.5)
    figure.suptitle(f"{table.title}: right answers in %", fontsize=10)
    figure.tight_layout()
    file = folder / f"{table.name}.png"
    figure.savefig(file, bbox_inches="tight")
    return file


def plot_axis(
    folder: Path,
    table: Table,
    key: str,
    results: Results,
) -> Path | None:
    """TABLE-KEY.png: the measures along one key, a line for each choice of the others;
    its path. None where no two runs differ in the key alone."""
    from matplotlib.figure import Figure

    there = {cell for cell, _ in results}
    cells = [cell for cell in table.cells if cell in there]
    lines: dict[tuple[str, ...], list[Cell]] = {}
    others = [other for other in table.keys if other != key]
    for cell in cells:
        fixed = tuple(f"{value_of(cell, o)}{_UNITS.get(o, '')}" for o in others)
        lines.setdefault(fixed, []).append(cell)
    lines = {fixed: own for fixed, own in lines.items() if len(own) > 1}
    if not lines:
        return None
    along = [c for own in lines.values() for c in own]
    values = list(dict.fromkeys(getattr(cell, key) for cell in along))
    if isinstance(values[0], int):
        values.sort()
    figure = Figure(figsize=(12, 3.6), dpi=120)
    panels = figure.subplots(1, len(MEASURES), squeeze=False)[0]
    for panel, (measure, name) in zip(panels, MEASURES.items(), strict=True):
        for number, (fixed, own) in enumerate(lines.items()):
            own = sorted(own, key=lambda cell: values.index(getattr(cell, key)))
            means, reaches = [], []
            for cell in own:
                of = [r for (c, _), r in results.items() if c == cell]
                mean, reach = mean_interval([100 * share(r, measure) for r in of])
                means.append(mean)
                reaches.append(math.nan if reach is None else reach)  # no bar
            places = [values.index(getattr(c, key)) + 0.05 * number for c in own]
            style = {"marker": "o", "ms": 4, "capsize": 3, "lw": 1.2}
            panel.errorbar(places, means, reaches, label=", ".join(fixed), **style)
        panel.set_xticks(range(len(values)), [str(value) for value in values])
        panel.set_title(name, fontsize=9)
        panel.tick_params(labelsize=7)
        panel.grid(axis="y", alpha=0.3)
    panels[-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1))
    figure.suptitle(f"{key}: right answers in %", fontsize=10)
    figure.tight_layout()
    file = folder / f"{table.name}-{key}.png"
    figure.savefig(file, bbox_inches="tight")
    return file


def _draw_row(panel: Any, row: int, shares: list[float], colour: str) -> None:
    percents = [100 * value for value in shares]
    mean, reach = mean_interval(percents)
    panel.plot(percents, [row] * len(percents), "o", color=colour, alpha=0.35, ms=4)
    if reach is None:
        panel.plot([mean], [row], "o", color=colour, ms=5)
    else:
        panel.errorbar([mean], [row], xerr=[reach], fmt="|", color=colour, capsize=3)


def _label(table: Table, cell: Cell) -> str:
    values = [value_of(cell, key) for key in table.keys]
    if table.name == "connectors":
        kind, tokens, pixels = values
        return f"{kind}, {tokens} tokens, {pixels} px"
    return values[0]
