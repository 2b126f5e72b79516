"""What MM1, MM1.5 and the models that the literature sets beside them published.

The numbers are in assets/published/results.json, each row with its source: the arXiv
id, the version where it is known, and how it was read:
    paper         in the paper or a table of its authors
    later paper   in a paper that restates it (MM1's by Apple, others by others)
    secondary     in a public note on the paper, not checked against it
Numbers of which no source was at hand are left out.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FILE = Path(__file__).resolve().parent.parent / "assets" / "published" / "results.json"

_ENDING = (
    "Papers differ in splits, prompts and what they trained on: figures beside each "
    "other are no ranking. Those that are marked 'secondary' were not checked against "
    "the paper itself."
)
# Tasks whose published figures have other names than theirs.
_PARTS = {
    "mme": ("mme_perception", "mme_cognition"),
    "mmbench_en_dev_once": ("mmbench_en_dev",),
    "scienceqa": ("scienceqa_img",),
}
_REFCOCO = "refcoco_average"


@dataclass(frozen=True)
class Published:
    """One published figure.

    benchmark: its key in the file, a task's name in most cases. form: "pretrained" or
    "tuned". read: see the module.
    """

    model: str
    benchmark: str
    value: float
    shots: int
    form: str
    source: str  # the title
    arxiv: str | None
    version: str | None
    read: str
    note: str

    @property
    def reference(self) -> str:
        """ "arXiv 2403.09611 v4", or the title where there is no such number."""
        if self.arxiv is None:
            return self.source
        return f"arXiv {self.arxiv} {self.version or '(version not known)'}"


@functools.cache
def _data() -> dict[str, Any]:
    return json.loads(_FILE.read_text(encoding="utf-8"))


def published(
    task: str | None = None, *, shots: int | None = None, model: str | None = None
) -> list[Published]:
    """The figures of a task, a number of shots, a model; None: of all."""
    data, found = _data(), []
    for row in data["rows"]:
        if model not in (None, row["model"]) or shots not in (None, row["shots"]):
            continue
        source = data["sources"][row["source"]]
        for benchmark, value in row["results"].items():
            if task is None or benchmark in _benchmarks(task):
                about = (row["shots"], row["form"], source["title"], source["arxiv"])
                read = (source["version"], source["read"], source["note"])
                found.append(Published(row["model"], benchmark, value, *about, *read))
    return found


def _benchmarks(task: str) -> tuple[str, ...]:
    """The keys of the file that a task's figure stands beside."""
    more = (_REFCOCO,) if task.startswith("refcoco") else ()
    return (*_PARTS.get(task, (task,)), *more)


def published_table(task: str) -> str:
    """A Markdown table of what was published for a task, and its sources; "" if nothing
    was."""
    found = published(task)
    if not found:
        return ""
    benchmarks = _data()["benchmarks"]
    sources: dict[str, int] = {}
    lines = ["| model | shots | published | of | read in | source |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for one in found:
        about = benchmarks[one.benchmark]
        number = sources.setdefault(_source(one), len(sources) + 1)
        cells = (one.model, one.shots, _figure(one.value), _of(about), one.read)
        lines.append(f"| {' | '.join(map(str, cells))} | [{number}] |")
    notes = [f"{number}. {text}" for text, number in sources.items()]
    return "\n".join([*lines, "", *notes, "", _ENDING])


def _of(about: dict[str, str]) -> str:
    return f"{about['name']} {about['split']}, {about['metric']}"


def _figure(value: float) -> str:
    """With a decimal, or with all that it was published with."""
    return f"{value:.1f}" if round(value, 1) == value else f"{value:g}"


def _source(one: Published) -> str:
    where = "" if one.arxiv is None else f", {one.reference}"
    return f"{one.source}{where}: {one.note}."
