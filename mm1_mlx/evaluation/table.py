"""The tasks that can be named: the benchmarks, and those of other modules."""

import difflib
import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from mm1_mlx.errors import DatasetError
from mm1_mlx.evaluation.own_modules import blaming, check_calls
from mm1_mlx.evaluation.samples import Task
from mm1_mlx.evaluation.tasks import ALIASES, TASKS

# Tasks that are not part of the installed package, by how their names begin.
_TINY = "examples.mm1_tiny.evaluation"
TINY = "mm1-tiny"


def tiny_tasks() -> dict[str, Task]:
    """mm1-tiny's own, which are made in a clone; nothing elsewhere."""
    try:
        found = importlib.util.find_spec(_TINY)
    except ModuleNotFoundError:  # there is no such package around it
        found = None
    return {} if found is None else tasks_from(_TINY)


def tasks_from(module: str) -> dict[str, Task]:
    """The tasks of a module, by its name or the path of its file: its TASKS.

    TASKS: a dict of Task by name, or a list of them. DatasetError where there is none,
    and for a mistake in it, with its line.
    """
    try:
        with blaming([module]):
            found = _module(module)
    except ImportError as error:
        raise DatasetError(
            f"--tasks-from {module}: {error}. Give the name of a module that Python "
            f"finds from here, or the path of its .py file."
        ) from error
    given = getattr(found, "TASKS", None)
    if isinstance(given, Mapping):
        given = list(given.values())
    if not isinstance(given, Sequence) or not all(isinstance(t, Task) for t in given):
        raise DatasetError(
            f"--tasks-from {module}: the module has no TASKS, a list of "
            f"mm1_mlx.evaluation.samples.Task."
        )
    for task in given:
        check_calls(task)
    return {task.name: task for task in given}


def _module(name: str) -> ModuleType:
    path = Path(name)
    if path.suffix != ".py":
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ImportError(f"There is no file {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def all_tasks(modules: Sequence[str] = ()) -> dict[str, Task]:
    """Every task by name; those of `modules` go before others of their names."""
    found = TASKS | tiny_tasks()
    for module in modules:
        found |= tasks_from(module)
    return found


def find_tasks(names: Sequence[str], modules: Sequence[str] = ()) -> list[Task]:
    """The tasks of these names; "mm1-tiny" is all of mm1-tiny's own.

    Raises DatasetError for a name that is not known, with those that are.
    """
    known = all_tasks(modules)
    chosen: dict[str, Task] = {}
    for name in names:
        name = name if name in known else ALIASES.get(name, name)
        if name == TINY and (tiny := tiny_tasks()):
            chosen |= tiny
        elif name in known:
            chosen[name] = known[name]
        else:
            raise DatasetError(_unknown(name, known))
    return list(chosen.values())


def find_task(name: str) -> Task:
    """The one task of a name."""
    return find_tasks([name])[0]


def _unknown(name: str, known: Mapping[str, Task]) -> str:
    if name == TINY or name.startswith("tiny_"):
        made = [task for task in known if task.startswith("tiny_")]
        if not made:
            return (
                f"The task '{name}' is made by examples/mm1_tiny, which is part of the "
                f"repository and not of the installed package: run this in the folder "
                f"of a clone."
            )
    by_lower = {each.lower(): each for each in [*ALIASES, *known]}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1)
    guess = f" Did you mean '{by_lower[near[0]]}'?" if near else ""
    return (
        f"There is no task '{name}'.{guess} The tasks are {', '.join(sorted(known))}."
    )
