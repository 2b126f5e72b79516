"""What an evaluation leaves to read: result.json, report.md, sheets of failures."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mm1_mlx.checkpoint.folder import replacing_file
from mm1_mlx.errors import DatasetError
from mm1_mlx.evaluation.published import published_table
from mm1_mlx.evaluation.results import Result
from mm1_mlx.evaluation.samples import Sample
from mm1_mlx.evaluation.sheet import Failure, draw_sheet
from mm1_mlx.inference.identity import fingerprint
from mm1_mlx.inputs.prompts import plural

RESULTS, REPORT = "result.json", "report.md"
FORMAT = "mm1_mlx results 1"
FAILURES = 24  # on a sheet
_ERRORS = 20  # listed of what could not be asked
_CELL = 160  # characters in a cell of a table

Entry = dict[str, Any]


class Report:
    """The report of a folder; each result that is added writes it anew.

    model: what it is called. weights: what its fingerprint is; a folder with results
    of another model is refused, or with force loses them.

    Raises DatasetError for a result.json that is not ours, or of another model.
    """

    def __init__(
        self,
        folder: Path,
        model: str,
        weights: Mapping[str, str],
        adapter: str | None = None,
        force: bool = False,
    ):
        self._folder = folder
        self._about = {"model": model, "adapter": adapter, "weights": dict(weights)}
        self._entries: list[Entry] = []
        path = folder / RESULTS
        if not path.exists():
            return
        found = _read(path)
        if found["weights"] == self._about["weights"]:
            self._entries = found["results"]
        elif not force:
            raise DatasetError(
                f"{folder} has results of another model ({found['model']}, or it was "
                f"trained or quantized anew). Give another --output; --force starts "
                f"it anew."
            )

    @classmethod
    def of(cls, folder: Path, model: Any, processor: Any, force: bool) -> "Report":
        """Of a model and processor that `load` has given, by the names that it had."""
        name, adapter = getattr(processor, "names", (None, None))
        name = name or "a model in memory"
        return cls(folder, name, fingerprint(model), adapter, force)

    def add(self, result: Result) -> None:
        """Take in a result, in place of an earlier one of its task and shots."""
        key = result.task.name, result.how.shots, result.how.wrong_images
        entry = result.to_dict() | {
            "mistakes": self._mistakes(result),
            "errors": [
                {name: r[name] for name in ("id", "where", "error") if name in r}
                for r in result.failed[:_ERRORS]
            ],
        }
        old = next((e for e in self._entries if _key(e) == key), None)
        if old is not None and result.answered < result.n:
            entry["timing"] = _timing(old["timing"], entry["timing"])
        kept = [e for e in self._entries if _key(e) != key]
        self._entries = sorted([*kept, entry], key=_key)
        values = {"format": FORMAT, **self._about, "results": self._entries}
        _write(self._folder / RESULTS, json.dumps(values, indent=1, default=str))
        _write(self._folder / REPORT, markdown(values))

    def _mistakes(self, result: Result) -> dict[str, Any]:
        """The worst answers, as text and as a sheet."""
        name = result.how.file(result.task.name, "-failures.png")
        wrong = result.how.wrong_images  # there a wrong answer is no failure
        worst = [] if wrong else failures(result)
        path = self._folder / name
        if not worst:
            path.unlink(missing_ok=True)
            return {}
        title = (
            f"{result.task.name}, {result.how.name}: {len(worst)} of "
            f"{_wrong(result)} answers that are not right"
        )
        draw_sheet(worst, path, title)
        listed = [
            {
                "id": one.id,
                "question": one.question,
                "expected": one.expected,
                "found": one.found,
            }
            for one in worst
        ]
        return {"sheet": name, "of": _wrong(result), "listed": listed}


def _key(entry: Entry) -> tuple[str, int, bool]:
    return entry["task"], entry["shots"], entry["wrong_images"]


def _timing(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run that went on with an earlier one: what both together took."""
    if not now["answered"]:
        return dict(before)
    total = {k: before[k] + now[k] for k in ("answered", "seconds", "tokens")}
    speed = round(total["tokens"] / max(total["seconds"], 1e-9), 2)
    peak = max(before["peak_memory_gb"], now["peak_memory_gb"])
    seconds = round(total["seconds"], 2)
    more = {"tokens_per_second": speed, "peak_memory_gb": peak, "seconds": seconds}
    return total | more


def _name(entry: Entry) -> str:
    return f"{entry['task']}, {_how(entry)}"


def _how(entry: Entry) -> str:
    """As How.name has it; older results do not say."""
    wrong = ", wrong pictures" if entry["wrong_images"] else ""
    return entry.get("how", f"{entry['shots']}-shot{wrong}")


def failures(result: Result, most: int = FAILURES) -> list[Failure]:
    """The worst answered samples, evenly spread over the task where there are more."""
    wrong = [
        (record["score"], place)
        for place, record in enumerate(result.records)
        if record["score"] is not None and record["score"] < 1 and "error" not in record
    ]
    worst = min((score for score, _ in wrong), default=0)
    lowest = [pair for pair in wrong if pair[0] == worst]
    if len(lowest) > most:
        wrong = [lowest[i * len(lowest) // most] for i in range(most)]
    chosen = sorted(wrong)[:most]
    return [
        _failure(result.samples[place], result.records[place], result.task.boxes)
        for _, place in chosen
    ]


def _wrong(result: Result) -> int:
    scores = [r["score"] for r in result.records if "error" not in r]
    return sum(score is not None and score < 1 for score in scores)


def _failure(sample: Sample, record: Mapping[str, Any], boxes: bool) -> Failure:
    question = sample.question or str(record["prompt"])
    if sample.choices:
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
        pairs = zip(letters, sample.choices, strict=False)
        question += " " + " ".join(f"{letter}) {text}" for letter, text in pairs)
    expected = " / ".join(dict.fromkeys(sample.answers or record["expected"]))
    drawn = (sample.fields["box"], record["value"]) if boxes else (None, None)
    found = record["answer"]
    return Failure(sample.id, sample.images, question, expected, found, *drawn)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] == FORMAT and {"model", "weights", "results"} <= set(found):
            markdown({"adapter": None, **found})  # each entry has all that it needs
            return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise DatasetError(
        f"{path} is not a result of this command, or damaged. Give another --output, "
        f"or remove the file."
    )


def _write(path: Path, text: str) -> None:
    with replacing_file(path) as new:
        text = text.rstrip("\n") + "\n"
        new.write_text(text, encoding="utf-8", errors="backslashreplace")


# --- markdown ------------------------------------------------------------------------


def markdown(values: Mapping[str, Any]) -> str:
    """The report of what result.json holds, beside what others have published."""
    entries = values["results"]
    adapter = f" with the adapter {values['adapter']}" if values["adapter"] else ""
    parts = [f"# {values['model']}{adapter}", _main_table(entries)]
    parts += [_groups(entry) for entry in entries if entry["groups"]]
    if published := _published(entries):
        parts += ["## Published results", *published]
    if any(entry["errors"] for entry in entries):
        parts += ["## Samples that could not be asked", _scoring_of_errors()]
        parts += [_errors(entry) for entry in entries if entry["errors"]]
    if any(entry["mistakes"] for entry in entries):
        parts.append("## Failures to look at")
        parts += [_mistakes(entry) for entry in entries if entry["mistakes"]]
    parts += ["## How it was measured", _settings(entries)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    lines += [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    text = " ".join(str(value).split()).replace("|", "\\|")
    return text if len(text) <= _CELL else text[: _CELL - 3] + "..."


def _main_table(entries: Sequence[Entry]) -> str:
    rows = [
        (
            e["task"],
            e["split"],
            _how(e).replace("-shot", "", 1),
            f"{e['total']:.1f}",
            interval(e),
            e["n"],
            e["failed"] or "",
        )
        for e in entries
    ]
    heads = "task", "split", "shots", "score", "95% interval", "n", "not asked"
    return _table(heads, rows)


def interval(entry: Mapping[str, Any]) -> str:
    """ "70.1 to 72.4", or a dash where there is none."""
    low, high = entry["low"], entry["high"]
    return "-" if low is None or high is None else f"{low:.1f} to {high:.1f}"


def _published(entries: Sequence[Entry]) -> list[str]:
    """The reference tables of the tasks, where something was published."""
    names = dict.fromkeys(entry["task"] for entry in entries)
    tables = [(name, published_table(name)) for name in names]
    return [f"### {name}\n\n{table}" for name, table in tables if table]


def _groups(entry: Entry) -> str:
    rows = [(name, f"{value:.1f}") for name, value in entry["groups"].items()]
    return _table((_name(entry), "score"), rows)


def _scoring_of_errors() -> str:
    return "They count as wrong."


def _errors(entry: Entry) -> str:
    rows = [(e["id"], e.get("where", ""), e["error"]) for e in entry["errors"]]
    head = f"{_name(entry)}: {entry['failed']} of {entry['n']}"
    return f"{head}\n\n" + _table(("sample", "where", "why"), rows)


def _mistakes(entry: Entry) -> str:
    found = entry["mistakes"]
    rows = [
        (m["id"], m["question"], m["expected"], m["found"]) for m in found["listed"]
    ]
    name = _name(entry)
    return (
        f"### {name}\n\n{len(rows)} of {plural(found['of'], 'answer')} not wholly "
        f"right, the worst first.\n\n![failures of {name}]({found['sheet']})\n\n"
        + _table(("sample", "question", "expected", "found"), rows)
    )


def _settings(entries: Sequence[Entry]) -> str:
    rows = []
    for e in entries:
        s, t = e["settings"], e["timing"]
        generation = s["generation"]
        stop = ", ".join(repr(text) for text in generation.get("stop") or []) or "-"
        rows.append(
            (
                _name(e),
                s["data"] or "made by the task",
                s["form"],
                _choice(s) if e["shots"] else "-",
                s["seed"],
                generation.get("max_tokens"),
                stop,
                generation.get("temp", 0.0),
                f"{t['answered']} in {t['seconds']:.0f} s",
                f"{t['tokens_per_second']:.1f}",
            )
        )
    heads = (
        *("task", "data", "prompt form", "shots", "seed", "tokens at most", "stops"),
        *("temperature", "answered", "tokens/s"),
    )
    seen = {tuple(e["versions"].items()) for e in entries}
    lines = [", ".join(f"{k} {v}" for k, v in some) for some in sorted(seen)]
    below = [f"Versions: {v}." for v in lines]
    for e in entries:
        if e.get("rule"):
            below.append(f"Answers of {_name(e)} are read by: {e['rule']}.")
        if "boxes" in e["settings"]:
            below.append(f"Boxes of {_name(e)}: {e['settings']['boxes']}.")
        if e["shots"] and (told := shots_in_words(e["settings"])):
            below.append(f"Shots of {_name(e)}: {told}.")
    return _table(heads, rows) + "\n\n" + "\n".join(below)


def _choice(settings: Mapping[str, Any]) -> str:
    if settings.get("shot_choice") == "nearest":
        return "the nearest"
    return "the same for all" if settings["same_shots"] else "drawn for each"


def shots_in_words(settings: Mapping[str, Any]) -> str:
    """Which shots, from where, and how they were shown; "" for older results."""
    s = settings
    if "shot_choice" not in s:
        return ""
    source = s["shots_from"]
    place = source or "the training split"
    told = {
        "random": f"of {place}, drawn with seed {s['seed']}",
        "first": f"the first of {place}",
        "nearest": f"the nearest of {place} by the encoder's features",
    }[s["shot_choice"]]
    if not s["same_shots"]:
        told += " for each question"
    if shown := s.get("shots_shown"):
        what = "lines" if source else "samples"
        told += f" ({what} {', '.join(map(str, shown))})"
    if s["balance_shots"]:
        told += ", as many of each answer as can be"
    if s["shot_reasoning"]:
        told += f", their reasoning shown before '{s['answer_mark']}'"
    if (high := s["high_resolution_shots"]) is not None:
        size = s["generation"].get("resolution") or "of the model"
        told += f", the last {high} in resolution {size}, those before in native"
    return told
