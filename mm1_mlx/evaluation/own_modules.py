"""Mistakes in a module of tasks of one's own (--tasks-from): which file and line."""

import importlib.util
import inspect
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mm1_mlx.errors import DatasetError, MM1Error
from mm1_mlx.evaluation.samples import Task

# What a task's functions are called with.
_CALLED_WITH = {
    "read": "where, split",
    "prompt": "sample",
    "shot_prompt": "sample",
    "target": "sample",
    "clean": "text, sample",
    "shot_clean": "text, sample",
    "metric": "answered",
    "shot_metric": "answered",
}


@contextmanager
def blaming(modules: Sequence[str]) -> Iterator[None]:
    """What goes wrong in these modules is a DatasetError with their file and line.

    modules: names or paths of .py files. What is wrong elsewhere stays what it is.
    """
    try:
        yield
    except MM1Error:
        raise
    except Exception as error:
        for module in modules:
            if told := mistake_in(module, error):
                raise DatasetError(told) from error
        raise


def mistake_in(module: str, error: Exception) -> str | None:
    """An error with its place in a module's file; None where it comes from elsewhere.

    The files beside it count too, and of a package all its files.
    """
    file = _file_of(module)
    if file is None:
        return None
    places = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    words = str(error)
    if isinstance(error, SyntaxError) and error.filename:  # of a file never run
        places.append((error.filename, error.lineno))
        words = error.msg
    package = file.name == "__init__.py"
    for name, line in reversed(places):
        place = Path(name).resolve()
        if file.parent in (place.parents if package else (place.parent,)):
            words = " ".join(words.split()) or "no message"
            return f"{place}, line {line}: {type(error).__name__}: {words}"
    return None


def _file_of(module: str) -> Path | None:
    if module.endswith(".py"):
        return Path(module).resolve()
    try:
        found = importlib.util.find_spec(module)
    except Exception:  # its package cannot be imported, or it is no name
        return None
    return None if found is None or not found.origin else Path(found.origin).resolve()


def check_calls(task: Task) -> None:
    """DatasetError for a function that cannot be called as it will be, and for settings
    that `generate` does not have."""
    from mm1_mlx.inference.settings import Settings

    try:
        Settings.of(dict(task.settings))
    except (TypeError, ValueError, MM1Error) as error:
        said = str(error).removesuffix(".")
        raise DatasetError(f"the task '{task.name}': {said}.") from error
    for name, given in _CALLED_WITH.items():
        function = getattr(task, name)
        if function is None and name.startswith("shot_"):
            continue
        wrong = _wrong_call(function, given.count(",") + 1)
        if wrong:
            raise DatasetError(
                f"{_place_of(function)}the task '{task.name}': {name} {wrong}, but is "
                f"called with ({given})."
            )


def _wrong_call(function: Any, count: int) -> str | None:
    if not callable(function):
        return f"is {function!r}"
    try:
        form = inspect.signature(function)
    except (TypeError, ValueError):  # some that are written in C do not say
        return None
    try:
        form.bind(*[None] * count)
    except TypeError:
        return f"takes {form}"
    return None


def _place_of(function: Any) -> str:
    code = getattr(function, "__code__", None)
    return "" if code is None else f"{code.co_filename}, line {code.co_firstlineno}: "
