"""How a door ends: its exit code, and one line for whatever went wrong."""

import argparse
import io
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

from mm1_mlx.cli.backend import require_mlx
from mm1_mlx.cli.parser import Parser, usage_error
from mm1_mlx.errors import MM1Error, MM1Warning, ToldElsewhere, UsageError

_show_usually = warnings.showwarning

OK, FAILED, MISUSED = 0, 1, 2
INTERRUPTED, CLOSED_PIPE = 130, 141  # 128 + signal, as shells count


def run_door(
    parser: Parser,
    run: Callable[[argparse.Namespace], int | None],
    argv: list[str] | None = None,
    *,
    needs_mlx: bool = True,
) -> int:
    """Parse `argv`, call `run`, and give the exit code.

    A usage error exits with 2 (argparse and UsageError). MM1Error and what the system
    refuses are one line `error: ...` on stderr and 1; `--debug` adds the traceback.
    Ctrl-C gives 130; what was printed stays.
    """
    _hold_standard_files()
    _never_fail_to_print()
    args = parser.parse_args(argv)
    if not getattr(args, "debug", False):  # damaged EXIF and such; the answer is whole
        warnings.filterwarnings("ignore", module="PIL")
    warnings.showwarning = _show_warning
    words = sys.argv[1:] if argv is None else argv
    args.invoked = [*parser.prog.split(), *words]  # for a model's provenance
    try:
        if needs_mlx:
            require_mlx()
        code = run(args) or OK
        sys.stdout.flush()  # here, so that a closed pipe is met inside the try
        return code
    except UsageError as error:
        print(usage_error(str(error), parser.prog), file=sys.stderr)
        return MISUSED
    except KeyboardInterrupt:
        _end_line()
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (`head`) has gone. Point stdout elsewhere, or Python complains
        # when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    except Exception as error:
        if getattr(args, "debug", False):
            import traceback

            traceback.print_exc()
        _end_line()
        if not isinstance(error, ToldElsewhere):
            print(f"error: {explain(error)}", file=sys.stderr, flush=True)
        _leave_together(error)
        return FAILED


def _show_warning(message: Any, category: type, *where: Any) -> None:
    """Ours as one line, others as Python shows them."""
    if issubclass(category, MM1Warning):
        print(f"warning: {message}", file=sys.stderr, flush=True)
    else:
        _show_usually(message, category, *where)


def explain(error: BaseException) -> str:
    """One line for the user about `error`, whatever it is."""
    text = " ".join(str(error).split())
    if isinstance(error, MM1Error):
        return text
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else text
    if isinstance(error, MemoryError) or "Unable to allocate" in text:
        return (
            f"Not enough memory ({text or 'MemoryError'}). Use a smaller model, fewer "
            f"or smaller images, or a shorter prompt."
        )
    if isinstance(error, RuntimeError):
        from mm1_mlx.processes import is_lost

        if is_lost(error):
            return (
                f"The processes of this run have lost each other ({text}). Where one "
                f"ended with an error, its own line says why."
            )
    return (
        f"unexpected {type(error).__name__}: {text or 'no message'}. This is a bug in "
        f"mm1_mlx: please report it with what --debug prints."
    )


def _leave_together(error: Exception) -> None:
    """Where all processes end by one error, none leaves before it is told."""
    if getattr(error, "agreed", False):
        from mm1_mlx.processes import meet

        meet()


def _hold_standard_files() -> None:
    """Let what is closed (`<&-`) be open and empty: else the next file that is opened
    has its number, and MLX takes the file 0 for one that could not be opened."""
    while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(opened)


def _never_fail_to_print() -> None:
    """A terminal that cannot show a character shows '?' instead of an error, and what
    is closed (`>&-`) swallows what is printed."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _end_line() -> None:
    """Finish a half-printed answer, so that the next line stands on its own."""
    try:
        if sys.stdout.isatty():
            print(flush=True)
        else:
            sys.stdout.flush()
    except OSError:
        pass
