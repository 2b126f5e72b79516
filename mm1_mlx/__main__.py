"""python -m mm1_mlx: every command behind one name.

Ctrl-C is quiet from the first import on, so nothing is imported at the top that takes
time: not even argparse.
"""

import sys
from typing import NoReturn

_INTERRUPTED = 130  # as mm1_mlx.cli.run has it, which may not be there yet

_HELP = """usage: mm1_mlx COMMAND [ARGUMENTS]

MM1 in MLX: a model that answers questions about pictures.

commands (each has --help; `python -m mm1_mlx.COMMAND` is the same):
{table}

options:
  -h, --help  show this help
  --version   show the version
"""


def main(argv: list[str] | None = None) -> int:
    """Hand `argv` to the door that its first word names; give the exit code."""
    try:
        return _open(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:  # before run_door could take it
        return _INTERRUPTED


def enter(name: str) -> NoReturn:
    """Run the door `name` with this process's arguments, and end the process.

    For `python -m mm1_mlx.NAME`, as the first thing that its module does.
    """
    sys.exit(main([name, *sys.argv[1:]]))


def _open(argv: list[str]) -> int:
    from mm1_mlx.cli.doors import DOORS, open_door, table

    name = argv[0] if argv else "--help"
    if name in ("-h", "--help", "help"):
        print(_HELP.format(table=table()), end="")
        return 0
    if name == "--version":
        from mm1_mlx import __version__

        print(f"mm1_mlx {__version__}")
        return 0
    if name not in DOORS:
        from mm1_mlx.cli.parser import did_you_mean, usage_error

        close = did_you_mean(name, DOORS) or f" (one of: {', '.join(DOORS)})"
        message = f"unknown command '{name}'{close}"
        print(usage_error(message, "mm1_mlx"), file=sys.stderr)
        return 2
    return open_door(name, argv[1:])


if __name__ == "__main__":
    sys.exit(main())
