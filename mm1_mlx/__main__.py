"""python -m mm1_mlx: every command behind one name."""

import sys

from mm1_mlx import __version__
from mm1_mlx.cli.doors import DOORS, open_door, table
from mm1_mlx.cli.parser import did_you_mean, usage_error

_HELP = f"""usage: mm1_mlx COMMAND [ARGUMENTS]

MM1 in MLX: a model that answers questions about pictures.

commands (each has --help; `python -m mm1_mlx.COMMAND` is the same):
{table()}

options:
  -h, --help  show this help
  --version   show the version
"""


def main(argv: list[str] | None = None) -> int:
    """Hand `argv` to the door that its first word names; give the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help", "help"):
        print(_HELP, end="")
        return 0
    if name == "--version":
        print(f"mm1_mlx {__version__}")
        return 0
    if name not in DOORS:
        close = did_you_mean(name, DOORS) or f" (one of: {', '.join(DOORS)})"
        message = f"unknown command '{name}'{close}"
        print(usage_error(message, "mm1_mlx"), file=sys.stderr)
        return 2
    return open_door(name, argv[1:])


if __name__ == "__main__":
    sys.exit(main())
