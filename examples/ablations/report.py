"""Tables and plots from the results of runs, and from nothing else."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from examples.ablations.findings import EFFECTS, Results, mean_interval
from examples.ablations.measure import MEASURES, share
from examples.ablations.plan import TABLES, Cell, Run, Size, Table, cell_of, value_of
from examples.ablations.work import RESULT, check_recipe, read_result
from mm1_mlx.errors import CheckpointError

REPORT = "report.md"


def read_results(folder: Path) -> Results:
    """The measured runs of a folder by cell and seed. CheckpointError if there is none,
    or they are of several sizes or data; ConfigError for one of another recipe or
    vocabulary than today's."""
    found = {}
    for file in sorted(folder.glob(f"*/{RESULT}")):
        result = read_result(file)
        if result["kind"] == "joint":
            cell, seed = cell_of(result["cell"]), result["seed"]
            check_recipe(file, result, Run("joint", cell, seed), Size(**result["size"]))
            found[cell, seed] = result
    if not found:
        raise CheckpointError(
            f"{folder} has no measured run (RUN/{RESULT}). `run` makes them."
        )
    if len({str(result["size"]) for result in found.values()}) > 1:
        raise CheckpointError(
            f"{folder} has runs of several sizes, which cannot be compared: keep those "
            f"of --quick in a folder of their own."
        )
    if len({result.get("data") for result in found.values()}) > 1:
        raise CheckpointError(
            f"{folder} has runs of several data (`data` in RUN/{RESULT}), which cannot "
            f"be compared: `run` says which are of others than today's."
        )
    return found


def write_report(folder: Path, readme: Path | None = None) -> list[Path]:
    """report.md, and PNGs for each table that has results and its axes (with
    matplotlib); all files.

    readme: its tables, too, between `<!-- NAME -->` and `<!-- end NAME -->`.
    """
    results = read_results(folder)
    told = note(results, minutes_of(folder))
    parts, plots = {}, {}
    for table in TABLES:
        if not (text := table_text(table, results)):
            continue
        parts[table.name] = text
        plots[table.name] = _plotted(folder, table, results)
    lines = ["# Ablations", "", told]
    for table in TABLES:
        if table.name in parts:
            lines += ["", f"## {table.title}", "", parts[table.name]]
            for file in plots[table.name]:
                lines += ["", f"![{table.title}]({file.name})"]
    report = folder / REPORT
    report.write_text("\n".join(lines) + "\n", encoding="utf-8")
    written = [report, *(file for files in plots.values() for file in files)]
    if readme is not None:
        _put_into(readme, parts | {"note": told})
        written.append(readme)
    return written


def _plotted(folder: Path, table: Table, results: Results) -> list[Path]:
    """The files of a table's plots; none where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        return []
    from examples.ablations.plots import plot_axis, plot_table

    found = [plot_table(folder, table, results)]
    if len(table.keys) > 1:
        along = (plot_axis(folder, table, key, results) for key in table.keys)
        found += [file for file in along if file]
    return found


def minutes_of(folder: Path) -> float:
    """Of one core: all runs of a folder, also of the encoders and decoders that others
    start from, with the questions."""
    runs = map(read_result, folder.glob(f"*/{RESULT}"))
    return sum(run["seconds"]["cpu"] for run in runs) / 60


def note(results: Results, minutes: float) -> str:
    """How many runs of how many there are, and what the numbers are."""
    blind = _mean([share(result, "naming0") for result in results.values()])
    seeds = sorted({seed for _, seed in results})
    cells = {cell for table in TABLES for cell in table.cells}
    there = {cell for cell, _ in results}
    quick = next(iter(results.values()))["size"]["width"] < 32
    warning = "**Made with --quick: a look at the machinery, no result.** "
    return (
        f"{warning if quick else ''}{len(results)} measured runs, "
        f"{len(there & cells)} of {len(cells)} cells, seeds "
        f"{', '.join(map(str, seeds))}; {minutes:.0f} minutes of one core with the "
        f"parts that they start from and the questions. Shares of "
        f"right answers in percent, greedy, exact match, on the same questions for "
        f"all. ± is half of the 95% t interval over seeds: what another seed may "
        f"change, not other questions. Naming "
        f"without the three pictures before it has {100 * blind:.1f} (mean of all)."
    )


def table_text(table: Table, results: Results) -> str:
    """A table in markdown and the differences below it; "" with fewer than two rows."""
    rows = []
    for cell in table.cells:
        own = [r for (c, _), r in sorted(results.items(), key=_seed) if c == cell]
        if not own:
            continue
        cells = [value_of(cell, key) for key in table.keys]
        for measure in MEASURES:
            cells.append(_percent([share(r, measure) for r in own]))
        cells.append(f"{_mean([_size(r) for r in own]) / 1e6:.2f}")
        cells.append(f"{_mean([_trained(r) for r in own]) / 60:.1f}")
        rows.append(f"| {' | '.join([*cells, str(len(own))])} |")
    if len(rows) < 2:  # the base alone compares nothing
        return ""
    heads = [*table.keys, *MEASURES.values(), "M weights", "CPU min", "seeds"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *rows]
    return "\n".join([*lines, *_effect_lines(table, results)])


def _effect_lines(table: Table, results: Results) -> list[str]:
    lines = []
    for effect in EFFECTS:
        if effect.table != table.name or not (found := effect.differences(results)):
            continue
        mean, reach = mean_interval(found)
        cells = (
            effect.what,
            MEASURES[effect.measure],
            _signed(mean, reach),
            effect.said,
            effect.verdict(mean, reach),
        )
        lines.append(f"| {' | '.join(cells)} |")
    if not lines:
        return []
    heads = "| difference | measure | points | MM1 | here |"
    return ["", heads, "|---|---|---|---|---|", *lines]


def _seed(item: tuple[tuple[Cell, int], Any]) -> int:
    return item[0][1]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _size(result: dict[str, Any]) -> float:
    return sum(result["weights"].values())


def _trained(result: dict[str, Any]) -> float:
    """Seconds of one core without those of the questions."""
    return result["seconds"]["cpu"] - result["measured_seconds"]


def _percent(shares: list[float]) -> str:
    mean, reach = mean_interval(shares)
    text = f"{100 * mean:.1f}"
    return text if reach is None else f"{text} ± {100 * reach:.1f}"


def _signed(mean: float, reach: float | None) -> str:
    text = f"{100 * mean:+.1f}"
    return text if reach is None else f"{text} ± {100 * reach:.1f}"


def _put_into(readme: Path, parts: dict[str, str]) -> None:
    """Replace what stands between the marks of each part. CheckpointError if a mark
    is missing; the file is unchanged then."""
    try:
        text = readme.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{readme} cannot be read: {error.strerror}.") from error
    for name, part in parts.items():
        start, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise CheckpointError(
                f"{readme} has no place for the table: write {start} and {end} where "
                f"it belongs."
            )
        before, _, rest = text.partition(start)
        after = rest.partition(end)[2]
        text = f"{before}{start}\n{part}\n{end}{after}"
    readme.write_text(text, encoding="utf-8")
