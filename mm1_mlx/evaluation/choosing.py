"""Which samples of a task are asked, and where they come from."""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from mm1_mlx.errors import DatasetError
from mm1_mlx.evaluation.datasets.rows import shown
from mm1_mlx.evaluation.references import reference
from mm1_mlx.evaluation.samples import Sample, Source, Task

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")


def source_of(task: Task, data: str | Path | None) -> Source:
    """Where a task is read from: a folder as a Path, a dataset of the hub as a str.

    Raises DatasetError for a folder that is not there, or a task without a usual place.
    """
    if not task.needs_data:
        return Path()
    if data is None:
        if task.hub is None:
            raise DatasetError(
                f"{task.name} has no usual place on the hub: give the folder of its "
                f"files with --data FOLDER."
            )
        return task.hub
    place = Path(data).expanduser()
    if place.exists():
        return place
    if isinstance(data, str) and _HUB_ID.fullmatch(data):
        return data
    raise DatasetError(
        f"--data {data} is not there: give the folder of {task.name}'s files, or a "
        f"dataset on the hub (ORG/NAME)."
    )


def choose_samples(
    task: Task, where: Source, limit: int | None, seed: int
) -> list[Sample]:
    """The samples to ask, in the dataset's order.

    limit: so many, drawn with the seed, for a dataset is often sorted; fewer are among
    more. Samples with the same fields["pair"] stay together, and of these each
    category comes once before one comes twice: MME adds its categories up. Of a task
    without an order (task.shuffled) they are the first.

    Raises DatasetError for a split without samples, or two with one id.
    """
    found = task.read(where, task.split)
    if not isinstance(found, Iterable):
        raise DatasetError(
            f"{task.name}: its read gave {shown(found)}, but must give samples: yield "
            f"each, or return a list."
        )
    samples = list(islice(found, limit) if task.shuffled else found)
    if not samples:
        raise DatasetError(f"{task.name}: {where} has no samples of '{task.split}'.")
    seen: dict[str, Sample] = {}
    for sample in samples:
        if not isinstance(sample, Sample):
            raise DatasetError(
                f"{task.name}: its read gave {shown(sample)}, but must give samples "
                f"(mm1_mlx.evaluation.samples.Sample)."
            )
        for name in ("images", "answers", "choices"):
            if isinstance(values := getattr(sample, name), str | bytes):
                raise DatasetError(
                    f"{task.name}: the {name} of sample {sample.id} are "
                    f"{shown(values)}, but must be a tuple: ({shown(values)},)."
                )
        if sample.id in seen:
            raise DatasetError(
                f"{task.name}: two samples have the id '{sample.id}'"
                f"{_places(seen[sample.id], sample)}. Each needs its own."
            )
        seen[sample.id] = sample
    if limit is None or limit >= len(samples):
        return samples
    return _drawn(samples, limit, seed)


def _places(*samples: Sample) -> str:
    places = [str(s.fields["where"]) for s in samples if "where" in s.fields]
    return f" ({' and '.join(places)})" if places else ""


def _drawn(samples: list[Sample], limit: int, seed: int) -> list[Sample]:
    groups: dict[object, list[int]] = {}
    for place, sample in enumerate(samples):
        groups.setdefault(sample.fields.get("pair", (place,)), []).append(place)
    order = list(groups.values())
    random.Random(f"samples/{seed}").shuffle(order)
    if len(order) < len(samples):
        first: dict[object, list[int]] = {}
        for group in order:
            first.setdefault(samples[group[0]].fields.get("category"), group)
        order.sort(key=lambda group: group not in first.values())
    taken: list[int] = []
    for group in order:
        if len(taken) >= limit:
            break
        taken += group
    return [samples[place] for place in sorted(taken)]


def with_wrong_images(samples: Sequence[Sample]) -> list[Sample]:
    """Each sample with the pictures of another one, as many: what is still answered
    right is guessed from the text.

    The next sample's whose pictures are others; fields["wrong_images"] where a sample
    has them. A sample without pictures, or without such a neighbour, stays as it is.
    """
    by_count: dict[int, list[int]] = {}
    for place, sample in enumerate(samples):
        by_count.setdefault(len(sample.images), []).append(place)
    shown = [_seen(sample) for sample in samples]
    found = list(samples)
    for count, places in by_count.items():
        for k, place in enumerate(places if count else []):
            own = samples[place].fields.get("wrong_images")
            others = [*places[k + 1 :], *places[:k]]
            other = next((o for o in others if shown[o] != shown[place]), place)
            images = samples[other].images if own is None else own
            found[place] = replace(samples[place], images=tuple(images))
    return found


def _seen(sample: Sample) -> list[dict[str, str]]:
    return [reference(image, None) for image in sample.images]
