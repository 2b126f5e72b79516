"""A picture for each table: every cell's measures, with intervals and single seeds."""

from pathlib import Path
from typing import Any

from examples.ablations.findings import mean_interval
from examples.ablations.measure import MEASURES, share
from examples.ablations.plan import Cell, Table, value_of

_COLOURS = ("#2563eb", "#ea7317", "#15803d", "#64748b")


def plot_table(
    folder: Path, table: Table, results: dict[tuple[Cell, int], dict[str, Any]]
) -> Path:
    """Write TABLE.png; its path."""
    from matplotlib.figure import Figure

    cells = [c for c in table.cells if any(c == known for known, _ in results)]
    figure = Figure(figsize=(9, 0.9 + 0.42 * len(cells)), dpi=120)
    panels = figure.subplots(1, len(MEASURES), sharey=True, squeeze=False)[0]
    for panel, (measure, name), colour in zip(
        panels, MEASURES.items(), _COLOURS, strict=True
    ):
        for row, cell in enumerate(cells):
            own = [r for (c, _), r in results.items() if c == cell]
            _draw_row(panel, row, [share(r["scores"], measure) for r in own], colour)
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
